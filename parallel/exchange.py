"""Sending tokens to their experts and back: differentiable, dropless, in chunks whose transfers hide behind work.

    rank    send c0, c1 | shared experts | experts c0 | experts c1        | add up c0, c1
    links     c0 -> c1 ->                             results c0 -> results c1 ->

The backward mirrors it: gradients of results set out, the shared experts' backward runs, then each chunk's experts.
One exchange of counts and one wait of the host a layer; none in the backward.
"""

# T tokens, D hidden, E routed experts, K top-k, C chunks

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from model.exchange import Exchange, ExpertFunction, LocalExchange
from parallel.communicator import Communicator
from parallel.config import ParallelConfig
from parallel.counts import ChunkPlan, Header, check_headers, demands, exchange_counts, node_rows, plan
from parallel.hop import Hop
from parallel.ranks import Ranks
from parallel.records import Form, forms
from parallel.trip import Arrive, Depart, Trip
from parallel.watch import Watch
from parallel.wire import PayloadName


class AllToAllExchange:
    """The `model.exchange.Exchange` protocol over communicators: process groups or virtual ranks.

    Args:
        communicator: the expert-parallel group as seen from this rank.
        kind: `all_to_all` sends a row for each choice, `dedup` one for each (token, rank) pair, `two_hop` one for each
            (token, node) pair between nodes and then one for each (token, rank) pair inside.
        chunks: runs of tokens that travel and are computed one behind the other.
        rows_budget: the most rows that may come to a rank at once, 0 for any. Where routing would bring more, the
            tokens go in as many runs as keep to it, one at a time, and the backward sends and computes each again.
        payload: how rows are written; `auto` in the dtype they are computed in.
        nodes: of two_hop, the ranks with this rank's place in each node, in order of node.
        inside: of two_hop, the ranks of this rank's node.
        watch: where this rank is, for errors.
    """

    def __init__(
        self,
        communicator: Communicator,
        kind: Literal["all_to_all", "dedup", "two_hop"] = "dedup",
        *,
        chunks: int = 1,
        rows_budget: int = 0,
        payload: PayloadName = "auto",
        nodes: Communicator | None = None,
        inside: Communicator | None = None,
        watch: Watch | None = None,
    ) -> None:
        if kind == "two_hop" and (nodes is None or inside is None or nodes.size * inside.size != communicator.size):
            raise ValueError("two_hop needs the group of nodes and the group inside the node, which make up the whole")
        self.communicator = communicator
        self.kind = kind
        self.chunks = chunks
        self.rows_budget = rows_budget
        self.payload = payload
        self.watch = Watch() if watch is None else watch
        self.ep_size = communicator.size
        self.ep_rank = communicator.rank
        self.exchanges = 0
        self._ways = [communicator] if kind != "two_hop" else [c for c in (nodes, inside) if c is not None]

    def run(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        n_routed_experts: int,
        experts: ExpertFunction,
        parameters: tuple[Tensor, ...],
        meanwhile: Callable[[], Tensor] | None = None,
        layer: str = "",
    ) -> tuple[Tensor, Tensor | None]:
        """See model.exchange.Exchange."""
        self.exchanges += 1
        self.watch.layer = layer
        tokens_form, other_form = forms(self.payload, x.dtype)
        plans, bounded = self._plan(topk_ids, n_routed_experts, x.shape[1], tokens_form, layer)
        trip = Trip(
            plans, bounded, self._hops(n_routed_experts), experts, topk_ids, self.kind == "all_to_all",
            (self.ep_rank * n_routed_experts // self.ep_size, n_routed_experts // self.ep_size),
            (tokens_form, other_form), self.watch, layer,
        )  # fmt: skip
        trip.keeps_graph = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, topk_weights, *parameters)
        )
        mark = Depart.apply(trip, x, topk_weights, *parameters)
        aside = None if meanwhile is None else meanwhile()
        return Arrive.apply(trip, mark), aside

    def _hops(self, n_experts: int) -> list[Hop]:
        local = n_experts // self.ep_size
        if len(self._ways) == 1:
            return [Hop(self._ways[0], 0, local)]
        nodes, inside = self._ways
        per_node = inside.size * local
        return [
            Hop(nodes, 0, per_node, "between nodes: "),
            Hop(inside, nodes.rank * per_node, local, "inside the node: "),
        ]

    def _plan(self, ids: Tensor, n_experts: int, hidden: int, form: Form, layer: str) -> tuple[list[ChunkPlan], bool]:
        """Exchanges counts; where they break the budget, again for as many chunks as keep to it."""
        plans, most = self._ask(ids, n_experts, hidden, form, layer, self.chunks)
        if not self.rows_budget or most[0] <= self.rows_budget:
            return plans, False
        a_token = min(ids.shape[1], n_experts // self.ep_size) if self.kind == "all_to_all" else 1
        at_once = max(1, self.rows_budget // (self.ep_size * a_token))  # tokens of each rank in a chunk
        plans, _ = self._ask(ids, n_experts, hidden, form, layer, -(-most[1] // at_once))
        return plans, True

    def _ask(
        self, ids: Tensor, n_experts: int, hidden: int, form: Form, layer: str, chunks: int
    ) -> tuple[list[ChunkPlan], tuple[int, int]]:
        """Returns the plans and, with a budget, the most rows of a rank and the most tokens, over all ranks."""
        header = Header(
            self.exchanges, self.watch.step, layer, chunks, ids.shape[1], hidden, n_experts, form.dtype.itemsize
        )
        asked = demands(ids, chunks, self.ep_size, n_experts, self.kind == "all_to_all")
        first = node_rows(ids, chunks, self._ways[0].size, n_experts) if len(self._ways) > 1 else None
        splits, rows, headers = exchange_counts(asked, first, self._ways, header)
        most = rows.new_zeros(2)
        if self.rows_budget:
            came = torch.stack([hop[1].sum() for hop in splits]).max()
            most = torch.stack([came, rows.new_full((), ids.shape[0])])
            self.communicator.all_reduce(most, "max")
        numbers = _to_host([*splits, rows, *headers, most])  # the one wait of the host
        n_hops = len(splits)
        for way, came in zip(self._ways, numbers[n_hops + 1 : -1], strict=True):
            members = getattr(way, "members", list(range(way.size)))
            check_headers(header, came, members, members[way.rank])
        return plan(ids.shape[0], numbers[:n_hops], numbers[n_hops]), tuple(numbers[-1])


def make_exchange(config: ParallelConfig, ranks: Ranks) -> Exchange:
    """The exchange that a configuration asks for; with one rank and no budget nothing has to be cut or sent."""
    if ranks.layout.ep_size == 1 and not config.rows_budget:
        return LocalExchange()
    spans = ranks.nodes is not None and ranks.inside is not None
    return AllToAllExchange(
        ranks.ep,
        "dedup" if config.dispatch == "two_hop" and not spans else config.dispatch,
        chunks=config.chunks,
        rows_budget=config.rows_budget,
        payload=config.payload,
        nodes=ranks.nodes,
        inside=ranks.inside,
        watch=ranks.watch,
    )


def _to_host(tensors: Sequence[Tensor]) -> list[Any]:
    """Nested lists of several integer tensors with one copy from the device."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    return [
        part.view(tensor.shape).tolist()
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    ]
