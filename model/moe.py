"""Mixture-of-experts feed-forward: router, exchange, routed experts, shared experts."""

# B batch, S seq, D hidden, E routed experts, L local experts, R received rows, I expert width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.grouped_mm import grouped_linear
from kernels.swiglu import swiglu
from model.config import ModelConfig
from model.exchange import Exchange
from model.mlp import MLP
from model.router import Router, RoutingMemory


class Experts(nn.Module):
    """This rank's experts as stacked weights: gate_up_proj (L, 2I, D), gate rows first, and down_proj (L, D, I)."""

    def __init__(
        self,
        n_local: int,
        hidden: int,
        intermediate: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        nan = float("nan")
        self.gate_up_proj = nn.Parameter(
            torch.full((n_local, 2 * intermediate, hidden), nan, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(torch.full((n_local, hidden, intermediate), nan, device=device, dtype=dtype))

    def forward(self, rows: Tensor, rows_per_expert: tuple[int, ...]) -> Tensor:
        """Apply each expert to its slice of rows: (R, D) -> (R, D)."""
        inner = swiglu(grouped_linear(rows, self.gate_up_proj, rows_per_expert))  # (R, I)
        return grouped_linear(inner, self.down_proj, rows_per_expert)


class MoE(nn.Module):
    """DeepSeekMoE (arXiv 2412.19437, equation 12): shared experts for every token plus each token's K routed ones.

    The router and every statistic know experts by their number. Where an expert lies is another matter: rank g has the
    slots g*L .. g*L+L-1, slot e holds expert e until `place` says otherwise, and tokens are sent to slots.
    """

    slot_of_expert: Tensor | None  # (E,) int64; None: every expert is in the slot of its number

    def __init__(
        self,
        config: ModelConfig,
        exchange: Exchange,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.n_routed_experts % exchange.ep_size:
            raise ValueError(
                f"model.n_routed_experts = {config.n_routed_experts} cannot be split over ep_size = "
                f"{exchange.ep_size}; use a multiple of ep_size"
            )
        self.n_routed_experts = config.n_routed_experts
        self.exchange = exchange
        self.gate = Router(config, device, dtype)
        n_local = config.n_routed_experts // exchange.ep_size
        self.expert_of_slot = tuple(range(config.n_routed_experts))
        self.register_buffer("slot_of_expert", None, persistent=False)
        self.experts = Experts(n_local, config.hidden_size, config.moe_intermediate_size, device, dtype)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, width, device, dtype)

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Numbers of the L experts that this rank's stacked weights hold, in storage order."""
        n_local = len(self.expert_of_slot) // self.exchange.ep_size
        return self.expert_of_slot[self.exchange.ep_rank * n_local :][:n_local]

    def place(self, expert_of_slot: Sequence[int]) -> None:
        """Sends tokens by another placement from now on; see `model.slots.place`."""
        row = tuple(expert_of_slot)
        in_order = tuple(range(self.n_routed_experts))
        if tuple(sorted(row)) != in_order:
            raise ValueError(f"a placement must hold each of {self.n_routed_experts} experts once, not {row}")
        self.expert_of_slot = row
        slots = torch.tensor(row, device=self.gate.e_score_correction_bias.device).argsort()
        self.slot_of_expert = None if row == in_order else slots

    def forward(self, x: Tensor, memory: RoutingMemory | None = None) -> tuple[Tensor, ...]:
        """Route, dispatch, compute, combine.

        Args:
            x: (B, S, D).
            memory: of this layer in this forward.

        Returns:
            (B, S, D), then the fields of LayerStats.
        """
        topk_ids, topk_weights, *stats = self.gate(x, memory)
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        slots = topk_ids if self.slot_of_expert is None else self.slot_of_expert[topk_ids]  # (T, K)
        dispatched = self.exchange.dispatch(tokens, slots, topk_weights, self.n_routed_experts)
        rows = self.experts(dispatched.rows, dispatched.rows_per_expert)  # (R, D)
        out = self.exchange.combine(rows, dispatched).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return (out, *stats)
