"""Triton kernels of rows in 8 bits: one pass each way for rows that fit a program's registers."""

# R rows, D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192


@triton.jit
def quantize_kernel(x_ptr, values_ptr, scales_ptr, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """A row's largest magnitude, then its scaled values; the second read of a row finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    broken = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        broken = tl.maximum(broken, (magnitude < float("inf")).to(tl.int32) == 0)
        peak = tl.maximum(peak, magnitude)
    highest = tl.max(peak, axis=0)
    scale = tl.where(highest == 0.0, 1.0, tl.div_rn(highest, LIMIT))
    scale = tl.where(tl.max(broken, axis=0) > 0, float("nan"), scale)
    tl.store(scales_ptr + row, scale)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.clamp(tl.div_rn(x, tl.broadcast_to(scale, (BLOCK,))), -LIMIT, LIMIT)
        tl.store(values_ptr + row * width + columns, value.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(values_ptr, scales_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(values_ptr + row * width + columns, mask=inside).to(tl.float32)
    out = value * tl.load(scales_ptr + row)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) -> (R, D) float8_e4m3fn, (R,) fp32."""
    x = x.detach().contiguous()
    n_rows, width = x.shape
    values = torch.empty(n_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        block = min(MAX_BLOCK, triton.next_power_of_2(max(width, 1)))
        quantize_kernel[(n_rows,)](x, values, scales, width, LIMIT=448.0, BLOCK=block)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, D) float8_e4m3fn, (R,) fp32 -> (R, D)."""
    n_rows, width = values.shape
    out = torch.empty(n_rows, width, dtype=dtype, device=values.device)
    if out.numel():
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        dequantize_kernel[(n_rows, triton.cdiv(width, block))](
            values.contiguous(), scales.contiguous(), out, width, BLOCK=block
        )
    return out
