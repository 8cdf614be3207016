"""How tokens reach their experts and come back: the protocol, and its one-rank implementation."""

# T tokens, D hidden, K top-k, R rows, N choices that arrived here, G ep_size

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# What this rank's experts do with rows: (rows (R, D), token_of_row (N,) int64, rows_per_expert, weights (N,) fp32,
# *parameters) -> (R, D). The N choices are sorted by local expert; choice n is row token_of_row[n], and result r is the
# weighted sum over the choices of row r. Differentiable by plain autograd in rows, weights and parameters.
ExpertFunction = Callable[..., Tensor]


class Exchange(Protocol):
    """Sends each token to the ranks of its chosen experts and adds up what they return. Differentiable."""

    ep_size: int  # G: ranks that together hold every expert once
    ep_rank: int  # this rank's place among them; it holds experts ep_rank*L .. ep_rank*L + L-1

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
        """Bring tokens to their experts, let these compute, bring the sums back.

        Args:
            x: (T, D); T may be 0 and may differ between ranks.
            topk_ids: (T, K) int64, global expert numbers.
            topk_weights: (T, K) fp32.
            n_routed_experts: E, a multiple of ep_size.
            experts: what this rank's experts do with what comes.
            parameters: handed to `experts`; they get their gradient once, however many pieces the rows come in.
            meanwhile: work of this rank alone, done while rows travel, forward and backward.
            layer: a name for errors.

        Returns:
            (T, D), each token's weighted sum over its K experts, and what `meanwhile` returned.
        """
        ...


class Choices(NamedTuple):
    """Choices sorted by local expert."""

    order: Tensor  # (N,) int64: flat (row, slot) number of each
    token_of_row: Tensor  # (N,) int64: its row


def sort_choices(ids: Tensor, n_choices: int) -> Choices:
    """Sort the slots that hold a local expert, those of one expert in order of row.

    Args:
        ids: (R, K) local expert numbers; slots of other ranks' experts hold a number greater than any here.
        n_choices: N, how many slots hold a local expert.
    """
    order = torch.argsort(ids.reshape(-1), stable=True)[:n_choices]
    return Choices(order, torch.div(order, max(1, ids.shape[1]), rounding_mode="floor"))


class LocalExchange:
    """All experts on this rank: nothing travels."""

    ep_size = 1
    ep_rank = 0

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
        """See Exchange."""
        order, token_of_row = sort_choices(topk_ids, topk_ids.numel())
        ones = torch.ones_like(topk_ids).reshape(-1)
        counts = topk_ids.new_zeros(n_routed_experts).scatter_add_(0, topk_ids.reshape(-1), ones).tolist()
        out = experts(x, token_of_row, tuple(counts), topk_weights.reshape(-1)[order], *parameters)
        return out, None if meanwhile is None else meanwhile()
