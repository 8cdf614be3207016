"""Triton kernels that bring rows to experts and back: each row read and written once, sums in order, no atomics."""

# T tokens, K top-k, N = T*K routed rows, D hidden, R rows

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of one program: 4096 in half precision are 8 KiB, enough to hide a row's latency.
MAX_BLOCK = 4096


class RowsOfToken(NamedTuple):
    """The rows of each token: `order[bounds[t] : bounds[t + 1]]`, ascending."""

    order: Tensor  # (R,) int64
    bounds: Tensor  # (T + 1,) int64


@triton.jit
def spread_kernel(x_ptr, inverse_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's row, read once, is written to its K places."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + token * width + columns, mask=inside)
    for k in tl.static_range(TOP_K):
        place = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + place * width + columns, x, mask=inside)


@triton.jit
def gather_sum_kernel(
    rows_ptr, inverse_ptr, weights_ptr, out_ptr, width,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's K rows are gathered, weighted and added up in fp32, in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        row = tl.load(rows_ptr + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        total += row
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr, rows_ptr, inverse_ptr, weights_ptr, grad_rows_ptr, grad_weights_ptr, width,
    DOTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's gradient goes to its K rows, weighted; the weights' gradients are its products with those rows."""
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(TOP_K):
        place = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        dot = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            grad = tl.load(grad_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
            if DOTS:
                dot += grad * tl.load(rows_ptr + place * width + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                grad_rows_ptr + place * width + columns,
                (grad * weight).to(grad_rows_ptr.dtype.element_ty),
                mask=inside,
            )
        if DOTS:
            tl.store(grad_weights_ptr + token * TOP_K + k, tl.sum(dot, axis=0))


@triton.jit
def sum_rows_kernel(rows_ptr, order_ptr, bounds_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """All rows of a token, any number of them, added up in fp32 in ascending order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        row = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


class TritonPermute(torch.autograd.Function):
    """Same values and gradients as the reference in kernels/permute.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return _spread(x.contiguous(), inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _gather_sum(grads[0].contiguous(), inverse, None, ctx.top_k), None, None


class TritonUnpermute(torch.autograd.Function):
    """Same values and gradients as the reference in kernels/permute.py."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, weights, inverse)
        return _gather_sum(rows, inverse, weights, weights.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, inverse = ctx.saved_tensors
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        n_tokens, top_k = weights.shape
        if n_tokens:
            unpermute_backward_kernel[(n_tokens,)](
                grads[0].contiguous(), rows, inverse, weights, grad_rows, grad_weights, rows.shape[1],
                DOTS=ctx.needs_input_grad[1], TOP_K=top_k, BLOCK=_block(rows.shape[1]),
            )  # fmt: skip
        return grad_rows, grad_weights if ctx.needs_input_grad[1] else None, None


def rows_of_token(token_of_row: Tensor, n_tokens: int) -> RowsOfToken:
    """Turn (R,) token of each row around, without waiting for the device."""
    tokens, order = torch.sort(token_of_row, stable=True)
    return RowsOfToken(order, torch.searchsorted(tokens, torch.arange(n_tokens + 1, device=tokens.device)))


def sum_rows(rows: Tensor, by_token: RowsOfToken) -> Tensor:
    """(R, D) -> (T, D) in rows' dtype; a token without rows gets zeros."""
    n_tokens, width = by_token.bounds.numel() - 1, rows.shape[1]
    out = torch.empty(n_tokens, width, dtype=rows.dtype, device=rows.device)
    if n_tokens:
        block = _block(width)
        sum_rows_kernel[(n_tokens, triton.cdiv(width, block))](
            rows.contiguous(), by_token.order, by_token.bounds, out, width, BLOCK=block
        )
    return out


def _spread(x: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    n_tokens, width = x.shape
    out = torch.empty(n_tokens * top_k, width, dtype=x.dtype, device=x.device)
    if n_tokens:
        block = _block(width)
        spread_kernel[(n_tokens, triton.cdiv(width, block))](x, inverse, out, width, TOP_K=top_k, BLOCK=block)
    return out


def _gather_sum(rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    width = rows.shape[1]
    n_tokens = inverse.numel() // top_k
    out = torch.empty(n_tokens, width, dtype=rows.dtype, device=rows.device)
    if n_tokens:
        block = _block(width)
        gather_sum_kernel[(n_tokens, triton.cdiv(width, block))](
            rows, inverse, rows if weights is None else weights, out, width,
            WEIGHTED=weights is not None, TOP_K=top_k, BLOCK=block,
        )  # fmt: skip
    return out


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), MAX_BLOCK)
