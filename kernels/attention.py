"""Causal attention: on a CPU block by block of the queries, on a GPU torch's own.

Each block of queries meets the keys up to its own end only, so half of the S x S products are never made, and all
products are plain batched ones, which run near a CPU's peak. Nothing of size S x S is kept: the backward makes each
block's probabilities again.

    S 8, blocks of 4:   queries 0..3 x keys 0..3,   queries 4..7 x keys 0..7
"""

# B batch, H heads, S seq, q width of queries and keys, v width of values, N heads of a group, W queries of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a block. 128 is no faster from 256 to 2,048 positions, and makes more products above the diagonal.
BLOCK = 64
# Scores of the heads that are worked on together: they should stay in a core's cache.
GROUP_BYTES = 2**20


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale * queries @ keys^T) @ values, each position seeing itself and earlier ones.

    Args:
        queries, keys: (B, H, S, q), any float dtype.
        values: (B, H, S, v), same dtype.
        scale: factor on the products.
        mask: (B, 1, S, S) bool, True where query (third) may see key (fourth); it must allow each position itself and
            no later one. None for all that is not later.

    Returns:
        (B, H, S, v).
    """
    plain = queries.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if queries.device.type == "cpu" and plain:
        hidden = None if mask is None else ~mask
        return cast(Tensor, _Blocked.apply(queries, keys, values, hidden, scale))
    # Unequal widths of keys and values would take the slow path that forms all S*S products; zeros are exact.
    padded = F.pad(values, (0, max(0, keys.shape[-1] - values.shape[-1])))
    out = F.scaled_dot_product_attention(queries, keys, padded, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., : values.shape[-1]]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        out = torch.empty_like(values)
        for group in _groups(queries):
            q, k, v, o = (tensor[group].flatten(0, 1) for tensor in (queries, keys, values, out))  # (N, S, q or v)
            for start, end in _blocks(queries.shape[2]):
                o[:, start:end] = _probabilities(q, k, hidden, group, start, end, scale) @ v[:, :end]
        ctx.save_for_backward(queries, keys, values, hidden)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, hidden = ctx.saved_tensors
        scale, grad = ctx.scale, grads[0].contiguous()
        grad_queries, grad_keys, grad_values = map(torch.zeros_like, (queries, keys, values))
        inputs = (queries, keys, values, grad, grad_queries, grad_keys, grad_values)
        for group in _groups(queries):
            q, k, v, g, gq, gk, gv = (tensor[group].flatten(0, 1) for tensor in inputs)
            for start, end in _blocks(queries.shape[2]):
                p = _probabilities(q, k, hidden, group, start, end, scale)  # (N, W, end)
                here = slice(start, end)
                gv[:, :end].baddbmm_(p.transpose(1, 2), g[:, here])
                gp = g[:, here] @ v[:, :end].transpose(1, 2)
                gs = torch.ops.aten._softmax_backward_data(gp, p, -1, p.dtype)
                gq[:, here].baddbmm_(gs, k[:, :end], alpha=scale)
                gk[:, :end].baddbmm_(gs.transpose(1, 2), q[:, here], alpha=scale)
        return grad_queries, grad_keys, grad_values, None, None


_Group = tuple[slice, slice]


def _groups(queries: Tensor) -> Iterator[_Group]:
    """Sequences and heads that are worked on together: whole sequences, or some heads of one, so that they lie in one
    piece."""
    batch, heads, seq_len, _ = queries.shape
    at_once = max(1, GROUP_BYTES // max(1, BLOCK * seq_len * queries.element_size()))
    if at_once >= heads:
        step = at_once // max(1, heads)
        yield from ((slice(first, first + step), slice(0, heads)) for first in range(0, batch, step))
        return
    for sequence in range(batch):
        yield from ((slice(sequence, sequence + 1), slice(h, h + at_once)) for h in range(0, heads, at_once))


def _blocks(seq_len: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, seq_len)) for start in range(0, seq_len, BLOCK))


def _probabilities(
    q: Tensor, k: Tensor, hidden: Tensor | None, group: _Group, start: int, end: int, scale: float
) -> Tensor:
    """(N, W, end): what each query of the block gives to each key up to the block's end."""
    scores = torch.baddbmm(q.new_empty(()), q[:, start:end], k[:, :end].transpose(1, 2), beta=0, alpha=scale)
    width = end - start
    if hidden is None:
        later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu_(1)
        scores[:, :, start:].masked_fill_(later, float("-inf"))
    else:
        of_group = hidden[group[0], :, start:end, :end]
        scores.view(of_group.shape[0], -1, width, end).masked_fill_(of_group, float("-inf"))
    return scores.softmax(-1)
