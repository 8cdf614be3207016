"""Triton kernels of RMSNorm: one pass forward, one backward; sums in fp32, no atomics."""

# R rows, D width, P programs of the backward

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Each program of the backward adds up the weight's gradient over its own rows; the few partial sums are added by torch.
MAX_PROGRAMS = 512


def launch_options(width: int) -> dict[str, int]:
    """BLOCK and num_warps of both kernels. A row lies in registers: with 4 warps 8,192 columns need 255 registers a
    thread and spill in the backward, with 16 they need 84 and do not (compiled for sm_90)."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


@triton.jit
def forward_kernel(x_ptr, weight_ptr, out_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, n_rows, width, BLOCK: tl.constexpr
):
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    start = program.to(tl.int64) * width
    for row in range(program, n_rows, n_programs):
        grad = tl.load(grad_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        unit = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
        grad_weight += grad * unit
        weighted = grad * weight
        grad_x = scale * (weighted - unit * (tl.sum(weighted * unit, axis=0) / width))
        tl.store(grad_x_ptr + start + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        start += n_programs.to(tl.int64) * width
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=inside)


class TritonRMSNorm(torch.autograd.Function):
    """Same arguments, values and gradients as the reference in kernels/rms_norm.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        rows, weight = x.contiguous().view(-1, width), weight.contiguous()
        out = torch.empty_like(rows)
        scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        if rows.shape[0]:
            forward_kernel[(rows.shape[0],)](rows, weight, out, scale, width, eps, **launch_options(width))
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        n_rows, width = rows.shape
        grad = grads[0].contiguous()
        grad_x = torch.empty_like(rows)
        programs = min(n_rows, MAX_PROGRAMS)
        partial = torch.empty(programs, width, dtype=torch.float32, device=rows.device)
        if n_rows:
            backward_kernel[(programs,)](
                grad, rows, weight, scale, grad_x, partial, n_rows, width, **launch_options(width)
            )
        return grad_x.view(grad.shape), partial.sum(0).to(weight.dtype), None
