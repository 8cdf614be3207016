"""Sending tokens to their experts and back: differentiable, dropless all-to-all with exact uneven splits.

# T tokens, D hidden, E routed experts, L local experts, K top-k, N = T*K routed rows, R received rows, G ep_size

    routed   (N, D)  this rank's rows, sorted by expert, therefore by destination rank
    received (R, D)  what came, in order of source rank, then regrouped by local expert
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.permute import Permutation, permutation, permute, sort_by_expert, unpermute
from model.exchange import Dispatched
from parallel.communicator import Communicator


@dataclass(frozen=True)
class DispatchHandle:
    """What `combine` needs to bring rows back; frozen, so that a recomputation can use it again."""

    routing: Permutation  # of N: flat (token, choice) index -> routed row
    topk_weights: Tensor  # (T, K) fp32, differentiable
    input_splits: list[int]  # (G,) rows sent to each rank
    output_splits: list[int]  # (G,) rows received from each rank
    regroup: Permutation  # of R: received row -> row grouped by expert


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; the gradient travels the same way back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, input_splits: list[int], output_splits: list[int], communicator: Communicator
    ) -> Tensor:
        ctx.splits = (input_splits, output_splits)
        ctx.communicator = communicator
        return communicator.all_to_all(rows, input_splits, output_splits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        input_splits, output_splits = ctx.splits
        return ctx.communicator.all_to_all(gradient, output_splits, input_splits), None, None, None


class AllToAllExchange:
    """The `model.exchange.Exchange` protocol over a communicator: a process group or virtual ranks.

    Args:
        communicator: the expert-parallel group as seen from this rank.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.ep_size = communicator.size
        self.ep_rank = communicator.rank

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, n_routed_experts: int) -> Dispatched:
        """Sends each token to the ranks of its experts.

        Args:
            x: (T, D) tokens; T may be 0 and may differ between ranks.
            topk_ids: (T, K) int64 global expert numbers.
            topk_weights: (T, K) fp32 weights of the choices.
            n_routed_experts: E, a multiple of ep_size.

        Returns:
            The received rows, grouped by local expert in ascending order.
        """
        routing = sort_by_expert(topk_ids)
        counts = torch.bincount(topk_ids.flatten(), minlength=n_routed_experts)  # (E,)
        sent = counts.view(self.ep_size, n_routed_experts // self.ep_size)  # (G, L)
        ones = [1] * self.ep_size
        came = self.communicator.all_to_all(sent, ones, ones)  # (G, L): rows that rank g sends to each expert here
        sent_host, came_host = torch.stack((sent, came)).tolist()  # the one host synchronisation of the layer
        input_splits = [sum(row) for row in sent_host]
        output_splits = [sum(row) for row in came_host]
        routed = permute(x, routing, topk_ids.shape[1])  # (N, D)
        received = _AllToAll.apply(routed, input_splits, output_splits, self.communicator)  # (R, D)
        regroup = permutation(regroup_index(came))
        rows = permute(received, regroup)  # (R, D), grouped by expert
        rows_per_expert = tuple(sum(column) for column in zip(*came_host, strict=True))
        handle = DispatchHandle(routing, topk_weights, input_splits, output_splits, regroup)
        return Dispatched(rows, rows_per_expert, handle)

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Brings the experts' outputs back and sums them, weighted, over each token's choices.

        Args:
            rows: (R, D) outputs in the order of `dispatched.rows`.
            dispatched: what `dispatch` returned.

        Returns:
            (T, D) the weighted sums.
        """
        handle: DispatchHandle = dispatched.handle
        back = permute(rows, Permutation(handle.regroup.inverse, handle.regroup.order))  # (R, D) by source rank
        routed = _AllToAll.apply(back, handle.output_splits, handle.input_splits, self.communicator)  # (N, D)
        return unpermute(routed, handle.topk_weights, handle.routing)  # (T, D)


def regroup_index(came: Tensor) -> Tensor:
    """The permutation from "by source rank, then expert" to "by expert, then source rank".

    Args:
        came: (G, L) int64, rows from each source rank for each local expert.

    Returns:
        (R,) int64: for each row in the new order its place in the old one.
    """
    n_sources, n_local = came.shape
    sizes = came.flatten()  # old order: source-major
    starts = sizes.cumsum(0) - sizes
    block_order = torch.arange(n_sources * n_local, device=came.device).view(n_sources, n_local).t().flatten()
    new_sizes = sizes[block_order]
    new_starts = new_sizes.cumsum(0) - new_sizes
    shift = torch.repeat_interleave(starts[block_order] - new_starts, new_sizes)
    return torch.arange(shift.numel(), device=came.device) + shift
