"""Triton kernel of the rotary embedding on interleaved pairs: one pass, no copy of a strided input."""

# d rotary width; the leading dimensions are taken as three: A, B, C

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32


@triton.jit
def turn_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, n_rows, size_b, size_c, half,
    x_a, x_b, x_c, table_a, table_b, table_c,
    SIGN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rows (a, b, c) of x by the angle of the same row in the tables, times SIGN; strides in elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = row % size_c
    b = row // size_c % size_b
    a = row // size_c // size_b
    inside = row < n_rows
    pair = tl.arange(0, HALF)
    mask = inside[:, None] & (pair < half)[None, :]
    at = (a * table_a + b * table_b + c * table_c)[:, None] + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0) * SIGN
    lane = tl.arange(0, 2 * HALF)
    both = inside[:, None] & (lane < 2 * half)[None, :]
    x = tl.load(x_ptr + (a * x_a + b * x_b + c * x_c)[:, None] + lane[None, :], mask=both, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, 2 * HALF))
    tl.store(out_ptr + row[:, None] * (2 * half) + lane[None, :], turned.to(out_ptr.dtype.element_ty), mask=both)


class TritonRotate(torch.autograd.Function):
    """Same values and gradients as the reference in kernels/rope.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    half = x.shape[-1] // 2
    leading = x.shape[:-1]
    rows = _three(x)
    cos, sin = (_three(table.expand(*leading, half)) for table in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    n_rows = x.numel() // x.shape[-1]
    turn_kernel[(triton.cdiv(n_rows, ROWS),)](
        rows, cos, sin, out, n_rows, rows.shape[1], rows.shape[2], half, *rows.stride()[:3], *cos.stride()[:3],
        SIGN=sign, ROWS=ROWS, HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return out


def _three(x: Tensor) -> Tensor:
    """With exactly three leading dimensions, last dimension dense; a view wherever one exists."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x.view((1,) * (4 - x.dim()) + x.shape)
