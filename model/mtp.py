"""Multi-token prediction module: one more decoder layer that looks one token further ahead."""

# B batch, S seq, D hidden

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.exchange import Exchange
from model.layers import Linear, RMSNorm
from model.real_tokens import RealTokens
from model.router import RoutingMemory


class MultiTokenPrediction(nn.Module):
    """Module k joins the hidden states of depth k-1 with the embeddings k tokens ahead. Embedding and head are the
    main model's; the module's own `norm` stands before the head (DeepSeek's layout calls it shared_head.norm).

    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2, equations 21-23. What the paper leaves open follows the programs
    that serve the released weights: the embedding's half comes first, and a depth hands on what its head sees, that is
    its normalised hidden states.
    """

    def __init__(
        self,
        config: ModelConfig,
        exchange: Exchange,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, device, dtype)
        self.hnorm = RMSNorm(hidden, eps, device, dtype)
        self.eh_proj = Linear(2 * hidden, hidden, device, dtype)
        self.block = Block(config, exchange, dense=False, device=device, dtype=dtype)
        self.norm = RMSNorm(hidden, eps, device, dtype)

    def forward(
        self,
        hidden: Tensor,
        ahead: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        memory: RoutingMemory | None = None,
        real: RealTokens | None = None,
    ) -> tuple[Tensor, ...]:
        """Go one depth further.

        Args:
            hidden: (B, S', D), depth k-1 at position t, as its head sees it.
            ahead: (B, S', D), embedding of token t+k.
            cos, sin, mask, memory: as in Block, for S' positions.
            real: positions t whose token t+k is of the same document; None for all. The others go to no expert.

        Returns:
            hidden (B, S', D) of depth k, normalised for the head, then Block's statistics.
        """
        joined = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], dim=-1))  # (B, S', D)
        hidden, *statistics = self.block(joined, cos, sin, mask, memory, real)
        return (self.norm(hidden), *statistics)
