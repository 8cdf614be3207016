"""The exchange over several ranks equals one rank that holds all experts: values and gradients, however skewed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.exchange import LocalExchange
from parallel.communicator import SingleCommunicator
from parallel.counts import OutOfStepError
from parallel.exchange import AllToAllExchange
from parallel.ranks import virtual_ranks
from parallel.threads import VirtualWorld, run_virtual_ranks
from parallel.wire import HEADER_NUMBERS, layer_bytes

EXPERTS, TOP_K, WIDTH = 8, 3, 5
KINDS = ("even", "random", "one expert takes all", "an expert without tokens", "all on one rank")
WAYS: dict[str, dict[str, Any]] = {
    "a row a choice": {"kind": "all_to_all"},
    "a row a choice, 3 chunks": {"kind": "all_to_all", "chunks": 3},
    "dedup": {"kind": "dedup"},
    "dedup, 2 chunks": {"kind": "dedup", "chunks": 2},
    "dedup, budget": {"kind": "dedup", "rows_budget": 6},
    "a row a choice, budget": {"kind": "all_to_all", "rows_budget": 12},
    "two hops": {"kind": "two_hop"},
    "two hops, 2 chunks": {"kind": "two_hop", "chunks": 2},
    "two hops, budget": {"kind": "two_hop", "rows_budget": 5},
}


def routing(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """(T, K) expert choices of a kind, a token's all different."""
    if kind == "even":
        return (torch.arange(tokens)[:, None] + torch.tensor([0, 3, 6])) % EXPERTS
    if kind == "one expert takes all":
        return torch.tensor([[5, 6, 0]]).expand(tokens, -1).clone()
    if kind == "all on one rank":  # of two; of four on two of them
        return torch.rand(tokens, 4, generator=generator).topk(TOP_K).indices
    if kind == "an expert without tokens":
        return torch.rand(tokens, EXPERTS - 1, generator=generator).topk(TOP_K).indices + 1
    return torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices


def inputs(kind: str, total: int) -> tuple[Tensor, ...]:
    """x (T, D), ids (T, K), gates (T, K), expert weights (E, D, D), upstream (T, D): the same for everybody."""
    generator = torch.Generator().manual_seed(3)
    x, gates = torch.randn(total, WIDTH, generator=generator), torch.rand(total, TOP_K, generator=generator)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
    upstream = torch.randn(total, WIDTH, generator=generator)
    return x, routing(kind, total, generator), gates, weights, upstream


def experts(
    rows: Tensor, token_of_row: Tensor, rows_per_expert: tuple[int, ...], gates: Tensor, weights: Tensor
) -> Tensor:
    """A different nonlinear map for each expert, weighted and added up: (R, D) -> (R, D)."""
    parts = rows[token_of_row].split(list(rows_per_expert))
    each = torch.cat([torch.tanh(part @ weight) for part, weight in zip(parts, weights, strict=True)])
    return torch.zeros_like(rows).index_add(0, token_of_row, each * gates[:, None].to(rows.dtype))


def run(exchange, x: Tensor, ids: Tensor, gates: Tensor, weights: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; returns output, what was done meanwhile, and the gradients of x, gates and weights."""
    x, gates, weights = (tensor.clone().requires_grad_() for tensor in (x, gates, weights))
    out, aside = exchange.run(x, ids, gates, EXPERTS, experts, (weights,), lambda: x.sin())
    ((out + aside) * upstream).sum().backward()
    return out.detach(), aside.detach(), x.grad, gates.grad, weights.grad


def exchange_of(world: VirtualWorld, rank: int, **options: Any) -> AllToAllExchange:
    """The exchange of a virtual rank, two ranks a node."""
    ranks = virtual_ranks(world, world.size, rank, ranks_per_node=2)
    return AllToAllExchange(ranks.ep, nodes=ranks.nodes, inside=ranks.inside, **options)


def share(tokens_by_rank: list[int], rank: int) -> slice:
    """A rank's tokens of all."""
    first = sum(tokens_by_rank[:rank])
    return slice(first, first + tokens_by_rank[rank])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens_by_rank", [[6, 6], [0, 7], [9, 0, 3, 1], [4, 4, 4, 4]])
def test_equals_one_rank(way: str, tokens_by_rank: list[int], kind: str) -> None:
    options, size = WAYS[way], len(tokens_by_rank)
    if options["kind"] == "two_hop" and size < 4:
        options = {**options, "kind": "dedup"}

    x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))
    whole = run(LocalExchange(), x, ids, gates, weights, upstream)

    def work(world: VirtualWorld, rank: int) -> tuple[Tensor, ...]:
        mine = share(tokens_by_rank, rank)
        exchange = exchange_of(world, rank, **options)
        return run(exchange, x[mine], ids[mine], gates[mine], weights.chunk(size)[rank], upstream[mine])

    parts = run_virtual_ranks(size, work)
    for number, name in enumerate(("output", "meanwhile", "x.grad", "gates.grad", "weights.grad")):
        joined = torch.cat([part[number] for part in parts])
        assert torch.allclose(joined, whole[number], rtol=1e-5, atol=1e-6), (kind, name)


@pytest.mark.parametrize("way", ["a row a choice", "dedup", "dedup, 2 chunks", "two hops", "two hops, 2 chunks"])
@pytest.mark.parametrize("payload", ["auto", "bf16", "fp8"])
@pytest.mark.parametrize("kind", ["random", "all on one rank"])
def test_bytes_are_those_of_the_formula(way: str, payload: str, kind: str) -> None:
    """Counts, forward and backward apart, for uneven tokens and each routing; D = 5 makes fp8 and bf16 rows odd."""
    tokens_by_rank = [9, 0, 3, 4]
    options = {**WAYS[way], "payload": payload}
    x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))

    def work(world: VirtualWorld, rank: int) -> tuple[int, int]:
        mine = share(tokens_by_rank, rank)
        exchange = exchange_of(world, rank, **options)
        tokens = x[mine].clone().requires_grad_()
        own = weights.chunk(4)[rank].clone().requires_grad_()
        out, _ = exchange.run(tokens, ids[mine], gates[mine], EXPERTS, experts, (own,))
        forward = exchange.communicator.traffic.reset().bytes_sent
        (out * upstream[mine]).sum().backward()
        return forward, exchange.communicator.traffic.reset().bytes_sent

    found = run_virtual_ranks(4, work)
    formula = layer_bytes(
        options["kind"], [ids[share(tokens_by_rank, rank)].tolist() for rank in range(4)], EXPERTS, WIDTH, 4,
        ranks_per_node=2, payload=payload, chunks=options.get("chunks", 1),
    )  # fmt: skip
    assert found == [(part.counts + part.forward, part.backward) for part in formula]


def test_fewer_bytes_the_more_choices_share_a_rank() -> None:
    """All three choices of every token on one other rank: a third of the rows."""
    choices = [[[4, 5, 6]] * 10, [[4, 5, 6]] * 10]
    each = layer_bytes("all_to_all", choices, EXPERTS, 1024, 2)
    pairs = layer_bytes("dedup", choices, EXPERTS, 1024, 2)
    assert [part.forward for part in each] == [30 * (2048 + 8), 30 * 2048]
    assert [part.forward for part in pairs] == [10 * (2048 + 24), 10 * 2048]


@pytest.mark.parametrize(("payload", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02), ("fp8", 0.08)])
def test_a_narrower_payload_stays_near(payload: str, tolerance: float) -> None:
    x, ids, gates, weights, upstream = inputs("random", 12)
    exact = run(LocalExchange(), x, ids, gates, weights, upstream)

    def work(world: VirtualWorld, rank: int) -> tuple[Tensor, ...]:
        mine = slice(6 * rank, 6 * rank + 6)
        exchange = exchange_of(world, rank, kind="dedup", payload=payload)
        return run(exchange, x[mine], ids[mine], gates[mine], weights.chunk(2)[rank], upstream[mine])

    parts = run_virtual_ranks(2, work)
    for number in (0, 2, 3, 4):
        joined = torch.cat([part[number] for part in parts])
        off = float((joined - exact[number]).norm() / exact[number].norm())
        assert off < tolerance, number
        assert payload == "fp32" or off > 1e-5, f"{number}: nothing was rounded"


def test_what_a_rank_keeps_does_not_travel() -> None:
    """Not even to itself, there and back; forward and backward, on every hop."""
    started: list[tuple[int, int, list[int], list[int]]] = []

    def work(world: VirtualWorld, rank: int) -> None:
        ranks = virtual_ranks(world, 4, rank, ranks_per_node=2)
        for communicator in (ranks.nodes, ranks.inside):
            assert communicator is not None
            start = communicator.start_all_to_all

            def noted(
                rows: Tensor, sent: list[int], came: list[int], what: str, room: Tensor | None = None,
                communicator: Any = communicator, start: Any = start,
            ) -> Any:  # fmt: skip
                if "counts" not in what:
                    started.append((communicator.rank, rows.shape[0], sent, came))
                return start(rows, sent, came, what, room)

            communicator.start_all_to_all = noted
        exchange = AllToAllExchange(ranks.ep, "two_hop", nodes=ranks.nodes, inside=ranks.inside)
        x, ids, gates, weights, upstream = inputs("random", 32)
        mine = share([8] * 4, rank)
        run(exchange, x[mine], ids[mine], gates[mine], weights.chunk(4)[rank], upstream[mine])

    run_virtual_ranks(4, work)
    assert len(started) == 4 * 2 * 4, "four passes of two hops on four ranks"
    for own, n_rows, sent, came in started:
        assert sent[own] == came[own] == 0
        assert n_rows == sum(sent)
    assert sum(sum(sent) for _, _, sent, _ in started) > 0


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["dedup", "all_to_all"])
def test_rows_that_stay_are_rounded_like_those_that_travel(payload: str, kind: str) -> None:
    """Each token has one expert, so nothing is added up: wherever it is, its result and gradients are the same bits."""
    x, _, gates, weights, upstream = inputs("random", 12)
    ids = torch.arange(12)[:, None] % EXPERTS

    def work(world: VirtualWorld, rank: int, here: slice) -> tuple[Tensor, ...]:
        exchange = exchange_of(world, rank, kind=kind, payload=payload)
        return run(exchange, x[here], ids[here], gates[here, :1], weights.chunk(2)[rank], upstream[here])

    places = (slice(0, 12), slice(12, 12))
    first = run_virtual_ranks(2, lambda world, rank: work(world, rank, places[rank]))
    second = run_virtual_ranks(2, lambda world, rank: work(world, rank, places[1 - rank]))
    for part in (0, 2, 3):  # output, gradients of tokens and of gates
        assert torch.equal(first[0][part], second[1][part])
        assert first[0][part].abs().sum() > 0


def test_a_wrong_split_is_noticed_and_frees_the_other_ranks() -> None:
    def work(world: VirtualWorld, rank: int) -> None:
        communicator = world.communicator([0, 1], rank)
        communicator.all_to_all(torch.zeros(2, 1), [1, 1], [1, 1] if rank == 0 else [2, 1])

    with pytest.raises(RuntimeError, match="sends 1 rows to rank 1, which expects 2"):
        run_virtual_ranks(2, work)


def test_ranks_out_of_step_are_noticed_before_a_row_travels() -> None:
    said = []

    def work(world: VirtualWorld, rank: int) -> None:
        exchange = exchange_of(world, rank)
        exchange.watch.step = 7 if rank == 2 else 6
        try:
            exchange.run(torch.zeros(1, WIDTH), torch.tensor([[0, 1, 2]]), torch.ones(1, 3), EXPERTS, experts, ())
        except OutOfStepError as error:
            said.append((rank, str(error), exchange.communicator.traffic.bytes_sent))

    run_virtual_ranks(4, work)
    assert sorted(rank for rank, _, _ in said) == [0, 1, 2, 3], "every rank stops"
    for rank, text, sent in said:
        other = 2 if rank != 2 else 0
        assert f"step {7 if other == 2 else 6} on rank {other} but {6 if other == 2 else 7} on rank {rank}" in text
        assert sent == 3 * 8 * (HEADER_NUMBERS + 2 + EXPERTS // 4), "counts only"


def test_bytes_sent_elsewhere_are_counted() -> None:
    def work(world: VirtualWorld, rank: int) -> int:
        communicator = world.communicator([0, 1], rank)
        communicator.all_to_all(torch.zeros(3, 4), [1, 2] if rank == 0 else [2, 1], [1, 2] if rank == 0 else [2, 1])
        return communicator.traffic.reset().bytes_sent

    assert run_virtual_ranks(2, work) == [2 * 4 * 4, 2 * 4 * 4]


class Heard:
    """A communicator of one rank that notes when transfers start and when they are waited for."""

    def __init__(self) -> None:
        self.inner = SingleCommunicator()
        self.rank, self.size, self.traffic = 0, 1, self.inner.traffic
        self.events: list[str] = []
        self.started = 0

    def start_all_to_all(
        self, rows: Tensor, sent: list[int], came: list[int], what: str, room: Tensor | None = None
    ) -> "HeardPending":
        self.started += 1
        self.events.append(f"start {what} {self.started}")
        return HeardPending(self, rows, f"wait {what} {self.started}")


class HeardPending:
    def __init__(self, owner: Heard, rows: Tensor, event: str) -> None:
        self.owner, self.rows, self.event = owner, rows, event

    def wait(self) -> Tensor:
        self.owner.events.append(self.event)
        return self.rows


class Noted(torch.autograd.Function):
    """Work of this rank alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("work")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("gradient of work")
        return grads[0], None


def test_work_is_done_and_chunks_are_computed_while_rows_travel() -> None:
    """One exchange of counts, then every transfer starts before anything is waited for that it need not wait for."""
    heard = Heard()
    x, ids, gates, weights, _ = inputs("random", 8)
    x.requires_grad_(), weights.requires_grad_()

    def computed(*given: Any) -> Tensor:
        heard.events.append("experts")
        return experts(*given)

    exchange = AllToAllExchange(heard, "dedup", chunks=2)
    out, aside = exchange.run(x, ids, gates, EXPERTS, computed, (weights,), lambda: Noted.apply(x, heard.events))
    assert heard.events == [
        "start exchange of counts 1", "wait exchange of counts 1",
        "start dispatch 2", "start dispatch 3", "work",
        "wait dispatch 2", "experts", "start combine 4", "wait dispatch 3", "experts", "start combine 5",
        "wait combine 4", "wait combine 5",
    ]  # fmt: skip
    heard.events.clear()
    (out + aside).sum().backward()
    assert heard.events == [
        "start gradient of combine 6", "start gradient of combine 7", "gradient of work",
        "wait gradient of combine 6", "start gradient of dispatch 8", "wait gradient of combine 7",
        "start gradient of dispatch 9", "wait gradient of dispatch 8", "wait gradient of dispatch 9",
    ]  # fmt: skip
