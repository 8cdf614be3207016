"""Triton kernels of the grouped product: rows by each expert's weight, and each expert's weight gradient."""

# D input width, N output width, L local experts, R rows, M a tile's rows

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_WIDE, BLOCK_INNER = 64, 64, 32


@triton.jit
def rows_kernel(
    x_ptr, weight_ptr, out_ptr, tiles_ptr, inner, wide, expert_stride, inner_stride, wide_stride,
    ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's rows times a tile of its weight, in fp32; x (R, inner) and out (R, wide) contiguous."""
    tile = tl.program_id(0)
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    mine, inside = rows < end, columns < wide
    total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for start in range(0, inner, INNER):
        depth = start + tl.arange(0, INNER)
        x = tl.load(
            x_ptr + rows[:, None] * inner + depth[None, :], mask=mine[:, None] & (depth < inner)[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + expert * expert_stride + depth[:, None] * inner_stride + columns[None, :] * wide_stride,
            mask=(depth < inner)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(x, weight, total, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * wide + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=mine[:, None] & inside[None, :],
    )


@triton.jit
def weights_kernel(
    grad_ptr, x_ptr, out_ptr, bounds_ptr, n_out, n_in,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's sum of outer products grad^T x over its rows; an expert with no row gets zeros."""
    expert = tl.program_id(0)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    ins = tl.program_id(2) * IN + tl.arange(0, IN)
    first, end = tl.load(bounds_ptr + expert), tl.load(bounds_ptr + expert + 1)
    total = tl.zeros((OUT, IN), dtype=tl.float32)
    for start in range(first, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mine = rows < end
        grad = tl.load(
            grad_ptr + rows[None, :] * n_out + outs[:, None], mask=mine[None, :] & (outs < n_out)[:, None], other=0.0
        )
        x = tl.load(x_ptr + rows[:, None] * n_in + ins[None, :], mask=mine[:, None] & (ins < n_in)[None, :], other=0.0)
        total = tl.dot(grad, x, total, input_precision="ieee")
    tl.store(
        out_ptr + expert.to(tl.int64) * n_out * n_in + outs[:, None] * n_in + ins[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(outs < n_out)[:, None] & (ins < n_in)[None, :],
    )


def rows_product(x: Tensor, weight: Tensor, counts: tuple[int, ...], transpose: bool) -> Tensor:
    """(R, D) by weight (L, N, D) -> (R, N), or (R, N) -> (R, D) when not transposed; padding rows zero."""
    matrix = weight.transpose(1, 2) if transpose else weight  # (L, inner, wide), any strides
    _, inner, wide = matrix.shape
    out = torch.empty(x.shape[0], wide, dtype=x.dtype, device=x.device)
    tiles = row_tiles(counts, BLOCK_ROWS)
    if tiles:
        rows_kernel[(len(tiles), triton.cdiv(wide, BLOCK_WIDE))](
            x.contiguous(), matrix, out, torch.tensor(tiles, dtype=torch.int32).to(x.device), inner, wide,
            *matrix.stride(), ROWS=BLOCK_ROWS, WIDE=BLOCK_WIDE, INNER=BLOCK_INNER,
        )  # fmt: skip
    out[sum(counts) :].zero_()
    return out


def weights_product(grad: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """(R, N) and (R, D) -> (L, N, D)."""
    n_out, n_in = grad.shape[1], x.shape[1]
    out = torch.empty(len(counts), n_out, n_in, dtype=x.dtype, device=x.device)
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    grid = (len(counts), triton.cdiv(n_out, BLOCK_WIDE), triton.cdiv(n_in, BLOCK_WIDE))
    weights_kernel[grid](
        grad.contiguous(), x.contiguous(), out, torch.tensor(bounds, dtype=torch.int32).to(x.device), n_out, n_in,
        OUT=BLOCK_WIDE, IN=BLOCK_WIDE, ROWS=BLOCK_INNER,
    )  # fmt: skip
    return out


def row_tiles(counts: tuple[int, ...], height: int) -> list[tuple[int, int, int]]:
    """Cut each expert's rows into tiles: (expert, first row, end of the expert's rows). `counts 3 0 5, height 4 ->
    (0, 0, 3) (2, 3, 8) (2, 7, 8)`"""
    tiles, start = [], 0
    for expert, count in enumerate(counts):
        end = start + count
        tiles += [(expert, first, end) for first in range(start, end, height)]
        start = end
    return tiles
