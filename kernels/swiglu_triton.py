"""Triton kernels of SwiGLU's elementwise half: one pass forward, one backward."""

# R rows, I intermediate width

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def forward_kernel(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, width, gate_stride, up_stride, out_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = grad_gate_ptr.dtype.element_ty
    place = row * out_stride + columns
    tl.store(grad_gate_ptr + place, (grad * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), mask=inside)
    tl.store(grad_up_ptr + place, (grad * silu).to(kind), mask=inside)


class TritonSwiGLU(torch.autograd.Function):
    """Of one tensor (..., 2I), gate first."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        _backward(grads[0], *gate_up.chunk(2, dim=-1), *out.chunk(2, dim=-1))
        return (out,)


class TritonSwiGLUPair(torch.autograd.Function):
    """Of two tensors (..., I)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _backward(grads[0], gate, up, grad_gate, grad_up)
        return grad_gate, grad_up


def _rows(x: Tensor) -> Tensor:
    """(R, I) with dense rows; a view where the leading dimensions allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    n_rows, width = gate.shape
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        forward_kernel[(n_rows, triton.cdiv(width, block))](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=block
        )
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    gate, up, grad_gate, grad_up = (_rows(x) for x in (gate, up, grad_gate, grad_up))
    n_rows, width = gate.shape
    if grad.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        backward_kernel[(n_rows, triton.cdiv(width, block))](
            grad.contiguous(), gate, up, grad_gate, grad_up, width, gate.stride(0), up.stride(0), grad_gate.stride(0),
            BLOCK=block,
        )  # fmt: skip
