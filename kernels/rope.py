"""Rotary position embedding on interleaved pairs: (x[2i], x[2i+1]) turns by the angle of position and frequency i."""

# B batch, S seq, H heads, d rotary width (even)

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each interleaved pair of the last dimension.

    Args:
        x: (..., d), any float dtype. Pair i is (x[..., 2i], x[..., 2i + 1]).
        cos, sin: fp32, last dimension d / 2, the rest broadcastable to x's leading dimensions.

    Returns:
        (..., d), contiguous, in x's dtype, pairs interleaved as in x; computed in fp32.

    Source: Su et al. 2021, arXiv 2104.09864; DeepSeek-V2 (arXiv 2405.04434) section 2.1.3 for its decoupled use.
    """
    return cast(Tensor, _Rotate.apply(x, cos, sin))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., d/2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = torch.empty(pairs.shape, dtype=torch.float32, device=x.device)
    torch.sub(even * cos, odd * sin, out=out[..., 0])
    torch.add(odd * cos, even * sin, out=out[..., 1])
    return out.flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation by the opposite angle, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None
