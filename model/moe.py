"""Mixture-of-experts feed-forward: router, exchange, routed experts, shared experts."""

# B batch, S seq, T = B*S tokens, D hidden, E routed experts, L local experts, R rows that came, N choices of local
# experts, I expert width

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kernels.experts import experts_mlp
from model.config import ModelConfig
from model.exchange import Exchange
from model.mlp import MLP
from model.real_tokens import RealTokens
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

        # Set by model/probe.py: looks at (what, rows (N, D), rows_per_expert) before and after the experts.
        self.inspect: Callable[[str, Tensor, tuple[int, ...]], None] | None = None

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        n_routed_experts: int,
        exchange: Exchange,
        meanwhile: Callable[[], Tensor] | None,
        layer: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Hand tokens (T, D) and the weights to the exchange; see Exchange.run. All of it happens in here, since a
        sharding engine gathers the weights for this module's forward and backward only."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type):  # before they travel: half the bytes
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        return exchange.run(
            x, topk_ids, topk_weights, n_routed_experts, self.weighted_sums, (gate_up, down), meanwhile, layer
        )

    def weighted_sums(
        self,
        rows: Tensor,
        token_of_row: Tensor,
        rows_per_expert: tuple[int, ...],
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        """The model.exchange.ExpertFunction: rows (R, D), N choices sorted by expert -> (R, D)."""
        if self.inspect is None:
            return experts_mlp(rows, token_of_row, gate_up, down, rows_per_expert, weights, combine=True)
        gathered = rows.index_select(0, token_of_row)  # (N, D)
        self.inspect("input", gathered, rows_per_expert)
        out = self.each_row(gathered, rows_per_expert, gate_up, down)
        self.inspect("output", out, rows_per_expert)
        return torch.zeros_like(rows).index_add(0, token_of_row, (out * weights.unsqueeze(-1)).to(rows.dtype))

    def each_row(self, rows: Tensor, rows_per_expert: tuple[int, ...], gate_up: Tensor, down: Tensor) -> Tensor:
        """Each expert on its slice of rows (N, D) -> (N, D), not weighted."""
        return experts_mlp(rows, None, gate_up, down, rows_per_expert)


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
        self.label = ""  # the module's path, for errors
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

    def forward(
        self, x: Tensor, memory: RoutingMemory | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, ...]:
        """Route, then exchange and compute; the shared experts work while rows travel.

        Args:
            x: (B, S, D).
            memory: of this layer in this forward.
            real: the tokens that there are, None for all. Other positions go to no expert, shared or routed, and
                nothing counts them; the output is zero there.

        Returns:
            (B, S, D), then the fields of LayerStats.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        if real is not None:
            tokens = real.take(tokens)  # (N, D); from here on T is N
        topk_ids, topk_weights, *stats = self.gate(x if real is None else tokens, memory, real)
        slots = topk_ids if self.slot_of_expert is None else self.slot_of_expert[topk_ids]  # (T, K)
        shared = None if self.shared_experts is None else partial(self.shared_experts, tokens)
        out, aside = self.experts(tokens, slots, topk_weights, self.n_routed_experts, self.exchange, shared, self.label)
        if aside is not None:
            out = out + aside
        if real is not None:
            out = real.spread(out)
        return (out.view_as(x), *stats)
