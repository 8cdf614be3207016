"""Multi-head latent attention: low-rank queries, keys and values, and one rotated key that all heads share."""

# B batch, S seq, D hidden, H heads, n = qk_nope_head_dim, r = qk_rope_head_dim, v = v_head_dim, q = n + r

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.attention import causal_attention
from kernels.rope import rotate
from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from model.positions import softmax_scale


def document_mask(doc_ids: Tensor) -> Tensor:
    """Who may look at whom: earlier positions and itself, inside one document.

    Args:
        doc_ids: (B, S) integers, non-decreasing along S.

    Returns:
        (B, 1, S, S) bool, True where query (third) may see key (fourth). Where every sequence is one document, plain
        causal attention does; see `model.real_tokens.find_real`.
    """
    seq_len = doc_ids.shape[1]
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=doc_ids.device).tril_()
    return (doc_ids[:, None, :, None] == doc_ids[:, None, None, :]).logical_and_(causal)


class Attention(nn.Module):
    """DeepSeek-V2's attention (arXiv 2405.04434, section 2.1), keys and values expanded from their latent."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_rank = config.kv_lora_rank
        self.scale = softmax_scale(config)
        hidden, eps, heads = config.hidden_size, config.latent_eps, self.n_heads
        self.low_rank_queries = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, device, dtype)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, device, dtype)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, device, dtype)
        else:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, device, dtype)
        self.kv_a_proj_with_mqa = Linear(hidden, self.kv_rank + self.rope, device, dtype)
        self.kv_a_layernorm = RMSNorm(self.kv_rank, eps, device, dtype)
        self.kv_b_proj = Linear(self.kv_rank, heads * (self.nope + self.value), device, dtype)
        self.o_proj = Linear(heads * self.value, hidden, device, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: (B, S, D).
            cos, sin: (S, r/2) fp32, of rotary_tables.
            mask: of document_mask; None for plain causal attention.

        Returns:
            (B, S, D).
        """
        batch, seq_len, _ = x.shape
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.low_rank_queries else self.q_proj(x)
        queries = queries.view(batch, seq_len, self.n_heads, self.nope + self.rope)  # (B, S, H, q)
        latent, shared_key = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, seq_len, self.n_heads, -1)  # (B, S, H, n+v)

        cos, sin = cos[:, None], sin[:, None]  # (S, 1, r/2): the same turn for every head
        plain, turned = queries.split([self.nope, self.rope], dim=-1)
        # Moved to (B, H, S, .) before they are put together, which writes them in that order without another copy.
        queries = torch.cat([plain.transpose(1, 2), rotate(turned, cos, sin).transpose(1, 2)], dim=-1)
        shared_key = rotate(shared_key.unsqueeze(2), cos, sin).expand(-1, -1, self.n_heads, -1)  # (B, S, H, r)
        keys, values = expanded.transpose(1, 2).split([self.nope, self.value], dim=-1)
        keys = torch.cat([keys, shared_key.transpose(1, 2)], dim=-1)  # (B, H, S, q)
        out = causal_attention(queries, keys, values, self.scale, mask)  # (B, H, S, v)
        out = out.transpose(1, 2).reshape(batch, seq_len, -1)  # (B, S, H*v)
        return self.o_proj(out)
