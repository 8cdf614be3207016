"""Triton kernels of the experts' feed-forward: the gather in the load, SwiGLU and its gradient in the epilogues."""

# T tokens, D hidden, L local experts, I expert width, R rows (grouped by expert, ascending)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import size_class
from kernels.grouped_mm_triton import (
    Rows,
    candidates,
    load_part,
    locate,
    n_programs,
    row_tiles,
    rows_on_device,
    rows_product,
    weights_product,
)  # fmt: skip
from kernels.permute_triton import RowsOfToken, rows_of_token, sum_rows
from kernels.tuning import HALF_PAIR, Blocks, blocks_for


@triton.jit
def gate_up_kernel(
    x_ptr, index_ptr, weight_ptr, hidden_ptr, active_ptr, table_ptr, count_ptr, bounds_ptr,
    n_experts, inner, width,
    GATHER: tl.constexpr, KEEP: tl.constexpr, ACTIVE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of rows by the gate's and the up projection's weight at once; stores both (KEEP) and silu(gate) * up
    (ACTIVE)."""
    n_columns = tl.cdiv(width, WIDE)
    n_tiles = tl.load(count_ptr)
    for item in range(tl.program_id(0), n_tiles * n_columns, tl.num_programs(0)):
        expert, first, end, column = locate(item, n_tiles, n_columns, table_ptr, bounds_ptr, GROUP)
        rows = first + tl.arange(0, ROWS)
        mine = rows < end
        rows = tl.where(mine, rows, first)
        if GATHER:
            sources = tl.load(index_ptr + rows).to(tl.int64)
        else:
            sources = rows.to(tl.int64)
        columns = column * WIDE + tl.arange(0, WIDE)
        inside = columns < width
        depth = tl.arange(0, INNER)
        x_part = x_ptr + sources[:, None] * inner + depth[None, :]
        gate_part = (
            weight_ptr
            + tl.minimum(expert, n_experts - 1).to(tl.int64) * (2 * width * inner)
            + depth[:, None]
            + columns[None, :] * inner
        )
        up_part = gate_part + width * inner
        gate = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        up = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        for start in range(0, tl.where(expert < n_experts, inner, 0), INNER):
            here = depth < inner - start
            both = here[:, None] & inside[None, :]
            x = load_part(x_part, here[None, :], WHOLE)
            gate = tl.dot(x, load_part(gate_part, both, WHOLE), gate, input_precision="ieee")
            up = tl.dot(x, load_part(up_part, both, WHOLE), up, input_precision="ieee")
            x_part += INNER
            gate_part += INNER
            up_part += INNER
        places = rows.to(tl.int64)[:, None]
        stored = mine[:, None] & inside[None, :]
        if KEEP:
            hidden = hidden_ptr + places * (2 * width) + columns[None, :]
            tl.store(hidden, gate.to(hidden_ptr.dtype.element_ty), mask=stored)
            tl.store(hidden + width, up.to(hidden_ptr.dtype.element_ty), mask=stored)
        if ACTIVE:
            active = gate * tl.sigmoid(gate) * up
            tl.store(
                active_ptr + places * width + columns[None, :], active.to(active_ptr.dtype.element_ty), mask=stored
            )


@triton.jit
def halves(x, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, WIDE // 2)), (0, 2, 1)))


@triton.jit
def through_activation(
    grad, scale, hidden_ptr, grad_hidden_ptr, active_ptr, rows, mine, begin, width, WIDE: tl.constexpr
):
    """From the gradient of some columns of the unweighted activation to that of gate and up; stores it and the weighted
    activation, returns each row's <gradient, activation>."""
    columns = begin + tl.arange(0, WIDE)
    stored = mine[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None]
    hidden = hidden_ptr + places * (2 * width) + columns[None, :]
    gate = tl.load(hidden, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(hidden + width, mask=stored, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    active = silu * up
    dots = tl.sum(grad * active, axis=1)
    grad *= scale[:, None]
    kind = grad_hidden_ptr.dtype.element_ty
    out = grad_hidden_ptr + places * (2 * width) + columns[None, :]
    tl.store(out, (grad * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), mask=stored)
    tl.store(out + width, (grad * silu).to(kind), mask=stored)
    tl.store(active_ptr + places * width + columns[None, :], (active * scale[:, None]).to(kind), mask=stored)
    return dots


@triton.jit
def hidden_grad_kernel(
    grad_ptr, index_ptr, weight_ptr, hidden_ptr, scale_ptr, grad_hidden_ptr, active_ptr, dots_ptr,
    table_ptr, count_ptr, bounds_ptr, n_experts, inner, width, n_rows,
    GATHER: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient by down (L, D, I) gives the gradient of the activation; from it and the kept first product
    the gradient of that product, the weighted activation, and this column tile's part of <gradient, activation>."""
    n_columns = tl.cdiv(width, WIDE)
    n_tiles = tl.load(count_ptr)
    for item in range(tl.program_id(0), n_tiles * n_columns, tl.num_programs(0)):
        expert, first, end, column = locate(item, n_tiles, n_columns, table_ptr, bounds_ptr, GROUP)
        rows = first + tl.arange(0, ROWS)
        mine = rows < end
        rows = tl.where(mine, rows, first)
        if GATHER:
            sources = tl.load(index_ptr + rows).to(tl.int64)
        else:
            sources = rows.to(tl.int64)
        columns = column * WIDE + tl.arange(0, WIDE)
        inside = columns < width
        depth = tl.arange(0, INNER)
        grad_part = grad_ptr + sources[:, None] * inner + depth[None, :]
        weight_part = (
            weight_ptr
            + tl.minimum(expert, n_experts - 1).to(tl.int64) * (width * inner)
            + depth[:, None] * width
            + columns[None, :]
        )
        total = tl.zeros((ROWS, WIDE), dtype=tl.float32)  # gradient of the unweighted activation
        for start in range(0, tl.where(expert < n_experts, inner, 0), INNER):
            here = depth < inner - start
            grad = load_part(grad_part, here[None, :], WHOLE)
            weight = load_part(weight_part, here[:, None] & inside[None, :], WHOLE)
            total = tl.dot(grad, weight, total, input_precision="ieee")
            grad_part += INNER
            weight_part += INNER * width
        # The epilogue needs five values for each of the tile: a quarter of the columns at a time, or registers spill.
        left, right = halves(total, ROWS, WIDE)
        first_quarter, second_quarter = halves(left, ROWS, WIDE // 2)
        third_quarter, fourth_quarter = halves(right, ROWS, WIDE // 2)
        if SCALE:
            scale = tl.load(scale_ptr + rows).to(tl.float32)
        else:
            scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
        begin = column * WIDE
        dots = through_activation(
            first_quarter, scale, hidden_ptr, grad_hidden_ptr, active_ptr, rows, mine, begin, width, WIDE // 4
        )
        dots += through_activation(
            second_quarter, scale, hidden_ptr, grad_hidden_ptr, active_ptr, rows, mine, begin + WIDE // 4, width,
            WIDE // 4,
        )  # fmt: skip
        dots += through_activation(
            third_quarter, scale, hidden_ptr, grad_hidden_ptr, active_ptr, rows, mine, begin + WIDE // 2, width,
            WIDE // 4,
        )  # fmt: skip
        dots += through_activation(
            fourth_quarter, scale, hidden_ptr, grad_hidden_ptr, active_ptr, rows, mine, begin + 3 * (WIDE // 4), width,
            WIDE // 4,
        )  # fmt: skip
        if SCALE:
            tl.store(dots_ptr + column.to(tl.int64) * n_rows + rows, dots, mask=mine)


class ExpertsTriton(torch.autograd.Function):
    """Same arguments, values and gradients as kernels/experts_reference.py; row counts may also be a device tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        token_of_row: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor | None,
        counts: Sequence[int] | Tensor,
        combine: bool,
        keep_hidden: bool,
    ) -> Tensor:
        source = source.contiguous()
        token_of_row = None if token_of_row is None else token_of_row.contiguous()
        weights = None if weights is None else weights.contiguous()
        n_rows = source.shape[0] if token_of_row is None else token_of_row.shape[0]
        rows = rows_on_device(counts, n_rows, source.device)
        keep = keep_hidden and any(ctx.needs_input_grad)
        hidden, active = _gate_up(source, token_of_row, gate_up, rows, keep=keep, with_active=True)
        out = rows_product(active, down, rows, transpose=True, scale=weights)
        by_token: RowsOfToken | tuple[()] = ()
        if token_of_row is not None and (combine or ctx.needs_input_grad[0]):
            by_token = rows_of_token(token_of_row, source.shape[0])
            if combine:
                out = sum_rows(out, by_token)
        ctx.save_for_backward(
            source, token_of_row, gate_up, down, weights, hidden if keep else None, rows.bounds, *by_token
        )
        ctx.combine, ctx.sizes = combine, rows[1:]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, token_of_row, gate_up, down, weights, hidden, bounds, *by_token = ctx.saved_tensors
        rows = Rows(bounds, *ctx.sizes)
        grad = grads[0].contiguous()
        grad_index = token_of_row if ctx.combine else None
        if hidden is None:
            hidden, _ = _gate_up(source, token_of_row, gate_up, rows, keep=True, with_active=False)
        grad_hidden, active, grad_weights = _hidden_grad(grad, grad_index, down, hidden, weights, rows)
        del hidden
        grad_source = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[3]:
            grad_down = weights_product(grad, active, rows, left_index=grad_index)  # (L, D, I)
        del active
        if ctx.needs_input_grad[2]:
            grad_gate_up = weights_product(grad_hidden, source, rows, right_index=token_of_row)  # (L, 2I, D)
        if ctx.needs_input_grad[0]:
            grad_source = rows_product(grad_hidden, gate_up, rows, transpose=False)  # (R, D)
            if token_of_row is not None:
                grad_source = sum_rows(grad_source, RowsOfToken(*by_token))
        if not ctx.needs_input_grad[4]:
            grad_weights = None
        return grad_source, None, grad_gate_up, grad_down, grad_weights, None, None, None


def _gate_up(
    source: Tensor, index: Tensor | None, weight: Tensor, rows: Rows, keep: bool, with_active: bool
) -> tuple[Tensor, Tensor]:
    """The first product (R, 2I) and the activation (R, I); what is not asked for is empty."""
    inner, width = weight.shape[2], weight.shape[1] // 2
    weight = weight.contiguous()
    hidden = source.new_empty(rows.n_rows if keep else 0, 2 * width)
    active = source.new_empty(rows.n_rows if with_active else 0, width)
    if not rows.n_rows:
        return hidden, active

    def launch(blocks: Blocks) -> None:
        tiles = row_tiles(rows, blocks.rows)
        items = tiles.limit * triton.cdiv(width, blocks.wide)
        gate_up_kernel[(n_programs(items, blocks, source.device),)](
            source, source if index is None else index, weight, hidden, active, tiles.table, tiles.n_tiles, rows.bounds,
            rows.n_experts, inner, width,
            GATHER=index is not None, KEEP=keep, ACTIVE=with_active,
            WHOLE=inner % blocks.inner == 0 and width % blocks.wide == 0,
            ROWS=blocks.rows, WIDE=blocks.wide, INNER=blocks.inner, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    key = (size_class(rows.n_rows), rows.n_experts, inner, width, index is not None, source.dtype)
    launch(blocks_for("gate_up", key, source.device, candidates(source.dtype, HALF_PAIR), launch))
    return hidden, active


def _hidden_grad(
    grad: Tensor, index: Tensor | None, down: Tensor, hidden: Tensor, weights: Tensor | None, rows: Rows
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of the first product (R, 2I), weighted activation (R, I), gradient of the weights (R,)."""
    inner, width = down.shape[1:]
    down = down.contiguous()
    grad_hidden = torch.empty_like(hidden)
    active = hidden.new_empty(rows.n_rows, width)
    dots: Tensor | None = None
    if not rows.n_rows:
        return grad_hidden, active, None if weights is None else torch.zeros_like(weights)

    def launch(blocks: Blocks) -> None:
        nonlocal dots
        tiles = row_tiles(rows, blocks.rows)
        n_columns = triton.cdiv(width, blocks.wide)
        if weights is not None:
            dots = torch.empty(n_columns, rows.n_rows, dtype=torch.float32, device=grad.device)
        hidden_grad_kernel[(n_programs(tiles.limit * n_columns, blocks, grad.device),)](
            grad, grad if index is None else index, down, hidden, grad if weights is None else weights, grad_hidden,
            active, grad if dots is None else dots, tiles.table, tiles.n_tiles, rows.bounds, rows.n_experts, inner,
            width, rows.n_rows,
            GATHER=index is not None, SCALE=weights is not None,
            WHOLE=inner % blocks.inner == 0 and width % blocks.wide == 0,
            ROWS=blocks.rows, WIDE=blocks.wide, INNER=blocks.inner, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    key = (size_class(rows.n_rows), rows.n_experts, inner, width, index is not None, grad.dtype)
    launch(blocks_for("hidden_grad", key, grad.device, candidates(grad.dtype, HALF_PAIR), launch))
    return grad_hidden, active, None if weights is None or dots is None else dots.sum(0).to(weights.dtype)
