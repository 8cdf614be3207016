"""Attention over the latent cache: keys and values are never expanded for a decoded token, queries and results are."""

# N tokens (packed), R rows, S tokens of the longest, T slots, H heads, n, r, v head widths as in model/attention.py,
# c = kv_lora_rank, W = c + r

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import causal_attention
from model.attention import Attention
from model.inference import Function, linear_function, norm_function
from model.span import Span

# A prompt of at least so many tokens is attended to in the expanded form. Whole forwards on one thread of an AVX512
# core in fp32, expanded and absorbed ms: preset debug, 8 tokens 2.9 and 2.4, 64 tokens 5.3 and 4.9, 256 tokens 14.4 and
# 16.4; two layers of 768 with 12 heads, 8 tokens 10.7 and 10.4, 64 tokens 24.4 and 24.8, 256 tokens 78 and 93.
EXPAND_FROM = 32


class CachedAttention:
    """One attention layer that reads and writes the latent cache.

    With W_UK and W_UV the halves of kv_b_proj, q_nope . (W_UK latent) = (W_UK^T q_nope) . latent, and the values'
    weighted sum is W_UV times the latents' weighted sum. So a head's query of n + r numbers becomes one of c + r that
    looks at the cache as it lies there, the same for all heads.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2, and appendix C for the absorbed matrices.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        nope, value, rank = attention.nope, attention.value, attention.kv_rank
        weight = attention.kv_b_proj.weight.view(attention.n_heads, nope + value, rank)
        self._queries = self._query_path(attention)
        self._latent, self._latent_norm = (
            linear_function(attention.kv_a_proj_with_mqa), norm_function(attention.kv_a_layernorm)
        )  # fmt: skip
        self._expand, self._out = linear_function(attention.kv_b_proj), linear_function(attention.o_proj)
        self._w_uk = weight[:, :nope]  # (H, n, c)
        self._w_uv = weight[:, nope:].transpose(1, 2)  # (H, c, v)

    @staticmethod
    def _query_path(attention: Attention) -> Function:
        """(N, D) -> (N, H*(n+r))."""
        if not attention.low_rank_queries:
            return linear_function(attention.q_proj)
        down, up = linear_function(attention.q_a_proj), linear_function(attention.q_b_proj)
        norm = norm_function(attention.q_a_layernorm)
        return lambda x: up(norm(down(x)))

    def forward(self, x: Tensor, turn: Tensor, span: Span, store: Tensor) -> Tensor:
        """Attend to the rows' cached tokens and to those of this forward.

        Args:
            x: (N, D).
            turn: (N, 1, r/2) complex64, the rotation at each token's position.
            span: the tokens' places.
            store: this layer's cache (B, C, W); gets N new entries.

        Returns:
            (N, D).
        """
        layer = self.attention
        queries = self._queries(x).view(-1, layer.n_heads, layer.nope + layer.rope)  # (N, H, n+r)
        latent, shared_key = self._latent(x).split([layer.kv_rank, layer.rope], dim=-1)
        plain, rotary = queries.split([layer.nope, layer.rope], dim=-1)
        turned = _rotate(torch.cat([rotary, shared_key.unsqueeze(1)], dim=1), turn)  # (N, H+1, r)
        latent = self._latent_norm(latent)
        span.write(store, torch.cat([latent, turned[:, -1]], dim=-1))
        if span.fresh and span.longest >= EXPAND_FROM:
            out = self._expanded(plain, turned, latent, span)
        else:
            out = self._absorbed(plain, turned, span, store)
        return self._out(out)

    def fill(self, x: Tensor, turn: Tensor, span: Span, store: Tensor) -> None:
        """Only writes the cache's new entries, the same as `forward`."""
        latent, shared_key = self._latent(x).split([self.attention.kv_rank, self.attention.rope], dim=-1)
        turned = _rotate(shared_key.contiguous().unsqueeze(1), turn)[:, 0]  # (N, r)
        span.write(store, torch.cat([self._latent_norm(latent), turned], dim=-1))

    def _absorbed(self, plain: Tensor, turned: Tensor, span: Span, store: Tensor) -> Tensor:
        """(N, H, n), (N, H+1, r) -> (N, H*v)."""
        layer = self.attention
        heads, rank = layer.n_heads, layer.kv_rank
        lifted = torch.bmm(plain.transpose(0, 1), self._w_uk).transpose(0, 1)  # (N, H, c)
        queries = span.padded(torch.cat([lifted, turned[:, :-1]], dim=-1)).flatten(1, 2)  # (R, S*H, W)
        keys = span.slots(store)  # (R, T, W)
        scores = torch.baddbmm(keys.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=layer.scale)
        if scores.dtype != torch.float32:
            scores = scores.float()
        if span.mask is not None:
            scores.view(span.n_rows, span.longest, heads, -1).add_(span.mask.unsqueeze(2))
        mixed = torch.bmm(scores.softmax(-1).to(keys.dtype), keys[..., :rank])  # (R, S*H, c)
        mixed = span.packed(mixed.view(span.n_rows, span.longest, heads, rank))  # (N, H, c)
        return torch.bmm(mixed.transpose(0, 1), self._w_uv).transpose(0, 1).flatten(1)

    def _expanded(self, plain: Tensor, turned: Tensor, latent: Tensor, span: Span) -> Tensor:
        """The training form, for rows without earlier tokens: padding stands behind, where no query looks."""
        layer = self.attention
        expanded = self._expand(latent).view(-1, layer.n_heads, layer.nope + layer.value)
        keys, values = expanded.split([layer.nope, layer.value], dim=-1)
        keys = torch.cat([keys, turned[:, -1:].expand(-1, layer.n_heads, -1)], dim=-1)
        queries = torch.cat([plain, turned[:, :-1]], dim=-1)
        q, k, v = (span.padded(part).transpose(1, 2) for part in (queries, keys, values))  # (R, H, S, n+r or v)
        out = causal_attention(q, k, v, layer.scale)
        return span.packed(out.transpose(1, 2)).flatten(1)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn interleaved pairs of the last dimension: x (N, h, r), turn (N, 1, r/2) complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
