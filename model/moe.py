"""Mixture-of-experts feed-forward: router, exchange, routed experts, shared experts."""

# B batch, S seq, D hidden, E routed experts, L local experts, R received rows, I expert width

from __future__ import annotations

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
    """DeepSeekMoE (arXiv 2412.19437, equation 12): shared experts for every token plus each token's K routed ones."""

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
        self.experts = Experts(n_local, config.hidden_size, config.moe_intermediate_size, device, dtype)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, width, device, dtype)

    def forward(self, x: Tensor, memory: RoutingMemory | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route, dispatch, compute, combine.

        Args:
            x: (B, S, D).
            memory: of this layer in this forward, where the choice must be repeatable.

        Returns:
            (B, S, D), tokens_per_expert (E,) int64, sequence_balance 0-d fp32, changed_by_bias 0-d int64.
        """
        topk_ids, topk_weights, tokens_per_expert, balance, changed = self.gate(x, memory)
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        dispatched = self.exchange.dispatch(tokens, topk_ids, topk_weights, self.n_routed_experts)
        rows = self.experts(dispatched.rows, dispatched.rows_per_expert)  # (R, D)
        out = self.exchange.combine(rows, dispatched).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, tokens_per_expert, balance, changed
