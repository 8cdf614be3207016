"""How rows reach their experts and come back: the protocol, and its one-rank implementation."""

# T tokens, D hidden, E routed experts, L local experts, K top-k, N = T*K routed rows, R received rows, G ep_size

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.permute import Permutation, permute, sort_by_expert, unpermute


class Dispatched(NamedTuple):
    """Rows that arrived at this rank's experts, and what it takes to bring them back."""

    rows: Tensor  # (R, D), grouped by local expert in ascending order
    rows_per_expert: tuple[int, ...]  # L host integers, their sum is R
    handle: Any  # private to the exchange that made it


class Exchange(Protocol):
    """Sends each token to the ranks of its chosen experts and adds up what they return. Both ways differentiable."""

    ep_size: int  # G: ranks that together hold every expert once
    ep_rank: int  # this rank's place among them; it holds experts ep_rank*L .. ep_rank*L + L-1

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, n_routed_experts: int) -> Dispatched:
        """Bring rows to their experts.

        Args:
            x: (T, D).
            topk_ids: (T, K) int64, global expert numbers.
            topk_weights: (T, K) fp32; they stay with the token and are applied in `combine`.
            n_routed_experts: E.
        """
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the experts' results (R, D) back: (T, D), each token's weighted sum over its K experts."""
        ...


class LocalExchange:
    """All experts on this rank: sort by expert, gather; then the weighted sum back."""

    ep_size = 1
    ep_rank = 0

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, n_routed_experts: int) -> Dispatched:
        moved = sort_by_expert(topk_ids)
        rows = permute(x, moved, topk_ids.shape[1])  # (N, D)
        counts = torch.bincount(topk_ids.reshape(-1), minlength=n_routed_experts).tolist()
        return Dispatched(rows, tuple(counts), (moved, topk_weights))

    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        moved: Permutation
        moved, topk_weights = dispatched.handle
        return unpermute(rows, topk_weights, moved)
