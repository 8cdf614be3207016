"""One decoder layer: attention and feed-forward, each behind a normalisation and around a residual."""

# B batch, S seq, D hidden, E routed experts

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.exchange import Exchange
from model.layers import RMSNorm
from model.mlp import MLP
from model.moe import MoE
from model.real_tokens import RealTokens
from model.router import RoutingMemory


class Block(nn.Module):
    """A decoder layer, dense or with experts."""

    def __init__(
        self,
        config: ModelConfig,
        exchange: Exchange,
        dense: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.dense = dense
        self.input_layernorm = RMSNorm(hidden, eps, device, dtype)
        self.self_attn = Attention(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps, device, dtype)
        self.mlp: MLP | MoE = (
            MLP(hidden, config.intermediate_size, device, dtype) if dense else MoE(config, exchange, device, dtype)
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        memory: RoutingMemory | None = None,
        real: RealTokens | None = None,
    ) -> tuple[Tensor, ...]:
        """Args: x (B, S, D); cos, sin, mask as in Attention; memory and real as in MoE.

        Returns:
            (x (B, S, D),) of a dense layer; with experts also the fields of LayerStats.
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        normed = self.post_attention_layernorm(x)
        if self.dense:
            return (x + self.mlp(normed),)
        out, *statistics = self.mlp(normed, memory, real)
        return (x + out, *statistics)
