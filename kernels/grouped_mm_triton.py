"""Triton kernels of the grouped product: rows by each expert's weight, and each expert's weight gradient.

For a weight's gradient rows may be given by index, and are then gathered while they are loaded (for the forward see
kernels/experts_triton.py). Tiles are listed on the device from row counts that lie there, so nothing waits for the
host. No atomics: the same input gives the same bits.
"""

# D input width, N output width, L local experts, R rows (grouped by expert, ascending)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import size_class
from kernels.tuning import FULL, HALF, HALF_OUTER, Blocks, blocks_for


class Rows(NamedTuple):
    """Who owns which rows, on the device."""

    bounds: Tensor  # (L + 2,) int32: first row of each expert, of the padding, and the number of rows
    n_rows: int
    n_experts: int


class Tiles(NamedTuple):
    """Row tiles of one height, listed on the device; padding rows are tiles of an expert L."""

    table: Tensor  # (limit, 2) int32: expert, first row
    n_tiles: Tensor  # (1,) int32: how many of them there are
    limit: int  # at most so many


@triton.jit
def tiles_kernel(bounds_ptr, table_ptr, count_ptr, n_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Program e lists the tiles of expert e; program L those of the padding, and counts all."""
    me = tl.program_id(0)
    slots = tl.arange(0, EXPERTS)
    before = slots < me
    begins = tl.load(bounds_ptr + slots, mask=before, other=0)
    ends = tl.load(bounds_ptr + slots + 1, mask=before, other=0)
    place = tl.sum((ends - begins + ROWS - 1) // ROWS, axis=0)  # tiles of the experts before
    first, end = tl.load(bounds_ptr + me), tl.load(bounds_ptr + me + 1)
    for row in range(first, end, ROWS):
        tl.store(table_ptr + place * 2, me)
        tl.store(table_ptr + place * 2 + 1, row)
        place += 1
    if me == n_experts:
        tl.store(count_ptr, place)


@triton.jit
def locate(item, n_tiles, n_columns, table_ptr, bounds_ptr, GROUP: tl.constexpr):
    """The item'th piece of work: expert, first row, end of the expert's rows, column tile. GROUP row tiles share a walk
    over the columns, so that both operands are found in the second cache."""
    per_group = GROUP * n_columns
    begin = item // per_group * GROUP
    height = tl.minimum(n_tiles - begin, GROUP)
    within = item % per_group
    tile = begin + within % height
    expert = tl.load(table_ptr + tile * 2)
    first = tl.load(table_ptr + tile * 2 + 1)
    return expert, first, tl.load(bounds_ptr + expert + 1), within // height


@triton.jit
def load_part(pointers, mask, WHOLE: tl.constexpr):
    """A load that drops the mask where the tile is known to be whole."""
    if WHOLE:
        part = tl.load(pointers)
    else:
        part = tl.load(pointers, mask=mask, other=0.0)
    return part


@triton.jit
def rows_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, table_ptr, count_ptr, bounds_ptr,
    n_experts, inner, wide, expert_stride, inner_stride, wide_stride,
    SCALE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles of rows times a tile of their expert's weight, summed in fp32; x (R, inner), out (R, wide) contiguous."""
    n_columns = tl.cdiv(wide, WIDE)
    n_tiles = tl.load(count_ptr)
    for item in range(tl.program_id(0), n_tiles * n_columns, tl.num_programs(0)):
        expert, first, end, column = locate(item, n_tiles, n_columns, table_ptr, bounds_ptr, GROUP)
        rows = first + tl.arange(0, ROWS)
        mine = rows < end
        # Rows past the expert's end are computed from a row that exists, and not stored.
        rows = tl.where(mine, rows, first)
        places = rows.to(tl.int64)[:, None]
        columns = column * WIDE + tl.arange(0, WIDE)
        inside = columns < wide
        depth = tl.arange(0, INNER)
        x_part = x_ptr + places * inner + depth[None, :]
        weight_part = (
            weight_ptr
            + tl.minimum(expert, n_experts - 1).to(tl.int64) * expert_stride
            + depth[:, None] * inner_stride
            + columns[None, :] * wide_stride
        )
        total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        # Padding rows have no weight: nothing is summed and zeros are stored.
        for start in range(0, tl.where(expert < n_experts, inner, 0), INNER):
            here = depth < inner - start
            x = load_part(x_part, here[None, :], WHOLE)
            weight = load_part(weight_part, here[:, None] & inside[None, :], WHOLE)
            total = tl.dot(x, weight, total, input_precision="ieee")
            x_part += INNER
            weight_part += INNER * inner_stride
        if SCALE:
            total *= tl.load(scale_ptr + rows)[:, None].to(tl.float32)
        tl.store(
            out_ptr + places * wide + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=mine[:, None] & inside[None, :],
        )


@triton.jit
def weights_kernel(
    left_ptr, left_index_ptr, right_ptr, right_index_ptr, out_ptr, bounds_ptr, n_out, n_in,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, WHOLE: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's sum of outer products left^T right over its rows; an expert with no row gets zeros."""
    n_left, n_right = tl.cdiv(n_out, OUT), tl.cdiv(n_in, IN)
    expert = tl.program_id(0) // (n_left * n_right)
    within = tl.program_id(0) % (n_left * n_right)
    begin = within // (GROUP * n_right) * GROUP
    height = tl.minimum(n_left - begin, GROUP)
    outs = (begin + within % (GROUP * n_right) % height) * OUT + tl.arange(0, OUT)
    ins = within % (GROUP * n_right) // height * IN + tl.arange(0, IN)
    out_inside, in_inside = outs < n_out, ins < n_in
    first, end = tl.load(bounds_ptr + expert), tl.load(bounds_ptr + expert + 1)
    total = tl.zeros((OUT, IN), dtype=tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        mine = rows < end
        if GATHER_LEFT:
            lefts = tl.load(left_index_ptr + rows, mask=mine, other=0).to(tl.int64)
        else:
            lefts = rows.to(tl.int64)
        if GATHER_RIGHT:
            rights = tl.load(right_index_ptr + rows, mask=mine, other=0).to(tl.int64)
        else:
            rights = rows.to(tl.int64)
        left_part = left_ptr + lefts[None, :] * n_out + outs[:, None]
        right_part = right_ptr + rights[:, None] * n_in + ins[None, :]
        if WHOLE:  # both widths are whole tiles; the last rows still are not
            left = tl.load(left_part, mask=mine[None, :], other=0.0)
            right = tl.load(right_part, mask=mine[:, None], other=0.0)
        else:
            left = tl.load(left_part, mask=mine[None, :] & out_inside[:, None], other=0.0)
            right = tl.load(right_part, mask=mine[:, None] & in_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(
        out_ptr + expert.to(tl.int64) * n_out * n_in + outs[:, None] * n_in + ins[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=out_inside[:, None] & in_inside[None, :],
    )


def rows_on_device(counts: Sequence[int] | Tensor, n_rows: int, device: torch.device) -> Rows:
    """Bounds from row counts, without waiting: host integers are sent, a tensor of the device stays there.

    Args:
        counts: L integers >= 0, sum at most n_rows.
        n_rows: R, padding included.
    """
    n_experts = len(counts)
    if isinstance(counts, Tensor):
        bounds = torch.empty(n_experts + 2, dtype=torch.int32, device=device)
        bounds[0] = 0
        torch.cumsum(counts.to(device), 0, dtype=torch.int32, out=bounds[1 : n_experts + 1])
        bounds[n_experts + 1] = n_rows
        return Rows(bounds, n_rows, n_experts)
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    host = torch.tensor([*ends, n_rows], dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    return Rows(host.to(device, non_blocking=True), n_rows, n_experts)


def row_tiles(rows: Rows, height: int) -> Tiles:
    """Cut each expert's rows, and the padding, into tiles. `bounds 0 3 3 8 8, height 4 -> (0, 0) (2, 3) (2, 7)`"""
    limit = triton.cdiv(rows.n_rows, height) + rows.n_experts
    device = rows.bounds.device
    table = torch.empty(limit, 2, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    tiles_kernel[(rows.n_experts + 1,)](
        rows.bounds, table, count, rows.n_experts, ROWS=height, EXPERTS=triton.next_power_of_2(rows.n_experts + 1)
    )
    return Tiles(table, count, limit)


def n_programs(items: int, blocks: Blocks, device: torch.device) -> int:
    """How many programs share so many items: some for each processor, or one an item."""
    if not blocks.waves or device.type != "cuda":
        return items
    return min(items, blocks.waves * torch.cuda.get_device_properties(device).multi_processor_count)


def candidates(dtype: torch.dtype, half: tuple[Blocks, ...] = HALF) -> tuple[Blocks, ...]:
    """Tile sizes worth trying for a dtype."""
    return FULL if dtype == torch.float32 else half


def rows_product(x: Tensor, weight: Tensor, rows: Rows, transpose: bool, scale: Tensor | None = None) -> Tensor:
    """Each row by its expert's weight.

    Args:
        x: (R, D) rows.
        weight: (L, N, D).
        rows: of R.
        transpose: (R, D) -> (R, N); False: (R, N) -> (R, D).
        scale: (R,), dense, multiplied onto the result before it is rounded.

    Returns:
        (R, N) or (R, D) in x's dtype, padding rows zero.
    """
    x = x.contiguous()
    matrix = weight.transpose(1, 2) if transpose else weight  # (L, inner, wide), any strides
    _, inner, wide = matrix.shape
    out = torch.empty(rows.n_rows, wide, dtype=x.dtype, device=x.device)
    if not rows.n_rows:
        return out

    def launch(blocks: Blocks) -> None:
        tiles = row_tiles(rows, blocks.rows)
        items = tiles.limit * triton.cdiv(wide, blocks.wide)
        rows_kernel[(n_programs(items, blocks, x.device),)](
            x, matrix, x if scale is None else scale, out, tiles.table, tiles.n_tiles, rows.bounds, rows.n_experts,
            inner, wide, *matrix.stride(),
            SCALE=scale is not None,
            WHOLE=inner % blocks.inner == 0 and wide % blocks.wide == 0,
            ROWS=blocks.rows, WIDE=blocks.wide, INNER=blocks.inner, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    key = (size_class(rows.n_rows), rows.n_experts, inner, wide, transpose, x.dtype)
    launch(blocks_for("rows_product", key, x.device, candidates(x.dtype), launch))
    return out


def weights_product(
    left: Tensor, right: Tensor, rows: Rows, left_index: Tensor | None = None, right_index: Tensor | None = None
) -> Tensor:
    """Each expert's sum of outer products.

    Args:
        left: (R, N), or (T, N) with `left_index` (R,), dense.
        right: (R, D), or (T, D) with `right_index` (R,), dense.

    Returns:
        (L, N, D) in right's dtype; zero for an expert with no row.
    """
    left, right = left.contiguous(), right.contiguous()
    n_out, n_in = left.shape[1], right.shape[1]
    out = torch.empty(rows.n_experts, n_out, n_in, dtype=right.dtype, device=right.device)

    def launch(blocks: Blocks) -> None:
        # A tile is `rows` x `wide` of the result; `inner` rows are summed at a time.
        grid = rows.n_experts * triton.cdiv(n_out, blocks.rows) * triton.cdiv(n_in, blocks.wide)
        weights_kernel[(grid,)](
            left, left if left_index is None else left_index, right, right if right_index is None else right_index,
            out, rows.bounds, n_out, n_in,
            GATHER_LEFT=left_index is not None, GATHER_RIGHT=right_index is not None,
            WHOLE=n_out % blocks.rows == 0 and n_in % blocks.wide == 0,
            OUT=blocks.rows, IN=blocks.wide, ROWS=blocks.inner, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    key = (
        size_class(rows.n_rows), rows.n_experts, n_out, n_in, left_index is not None, right_index is not None,
        right.dtype,
    )  # fmt: skip
    launch(blocks_for("weights_product", key, left.device, candidates(right.dtype, HALF_OUTER), launch))
    return out
