"""The experts' feed-forward in plain torch: rows in pieces that stay near a CPU's cache; also the oracle."""

# T tokens, D hidden, L local experts, I expert width, R rows (grouped by expert, ascending), P rows of a piece

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_mm import grouped_mm, offsets, takes_grouped_mm, zero_where_empty
from kernels.products import outer_product, rows_product

# The input, hidden values and results of a piece. Smaller pieces cut an expert's products in two and lose more by that
# than they gain by the cache; larger ones only take memory.
PIECE_BYTES = 16 * 2**20


class Piece(NamedTuple):
    """A run of rows start..end: the experts that own them and how many each. Only a piece's first expert may have had
    rows in the piece before."""

    start: int
    end: int
    experts: tuple[int, ...]
    sizes: tuple[int, ...]
    continues: bool


def pieces(counts: tuple[int, ...], limit: int) -> list[Piece]:
    """Cut the rows, in order, into pieces of at most `limit` rows; an expert is cut only where it is longer.

    `counts 3 0 5 1, limit 4 -> 0..3 of expert 0; 3..7 of expert 2; 7..9 of experts 2 and 3`
    """
    found: list[Piece] = []
    start = row = 0
    experts: list[int] = []
    sizes: list[int] = []
    continues = False

    def close(next_continues: bool) -> None:
        nonlocal start, continues
        if row > start:
            found.append(Piece(start, row, tuple(experts), tuple(sizes), continues))
        start, continues = row, next_continues
        experts.clear()
        sizes.clear()

    for expert, count in enumerate(counts):
        if count > limit - (row - start):
            close(False)
        while count:
            size = min(count, limit)
            experts.append(expert)
            sizes.append(size)
            row += size
            count -= size
            if count:
                close(True)
    close(False)
    return found


class ExpertsReference(torch.autograd.Function):
    """Saves the parameters themselves, not views, so that a sharding engine may free and refill their storage."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        token_of_row: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor | None,
        counts: tuple[int, ...],
        combine: bool,
        keep_hidden: bool,
    ) -> Tensor:
        n_rows = source.shape[0] if token_of_row is None else token_of_row.shape[0]
        cut = pieces(counts, _piece_rows(gate_up) if source.device.type == "cpu" else max(n_rows, 1))
        longest = max((piece.end - piece.start for piece in cut), default=0)
        keep = keep_hidden and any(ctx.needs_input_grad)
        hidden = source.new_empty(n_rows if keep else longest, gate_up.shape[1])
        out = _sums_like(source) if combine else source.new_empty(n_rows, source.shape[1])
        first, second = _Matrices.of(gate_up.transpose(1, 2)), _Matrices.of(down.transpose(1, 2))
        for piece in cut:
            rows = _rows(piece, source, token_of_row)
            inner = hidden[piece.start : piece.end] if keep else hidden[: piece.end - piece.start]
            _product(piece, rows, first, inner)
            gate, up = inner.chunk(2, dim=-1)
            active = F.silu(gate).mul_(up)  # (P, I)
            result = torch.empty_like(rows) if combine else out[piece.start : piece.end]
            _product(piece, active, second, result)
            if weights is not None:
                result.mul_(weights[piece.start : piece.end, None])
            if combine:
                _add_rows(out, result, _tokens(piece, token_of_row))
        if not combine:
            out[sum(counts) :].zero_()
        ctx.save_for_backward(source, token_of_row, gate_up, down, weights, hidden if keep else None)
        ctx.cut, ctx.counts, ctx.combine = cut, counts, combine
        return out.to(source.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, token_of_row, gate_up, down, weights, hidden = ctx.saved_tensors
        needs_source, _, needs_gate_up, needs_down, needs_weights = ctx.needs_input_grad[:5]
        sparse = token_of_row is not None
        grad_out = grads[0].contiguous()  # an expanded one, as that of a sum, no grouped product takes
        grad_source = (_sums_like(source) if sparse else torch.empty_like(source)) if needs_source else None
        grad_gate_up = _gradient_like(gate_up, ctx.counts) if needs_gate_up else None
        grad_down = _gradient_like(down, ctx.counts) if needs_down else None
        grad_weights = torch.zeros_like(weights) if needs_weights else None
        matrices, down_matrices = _Matrices.of(gate_up), _Matrices.of(down)
        first = _Matrices.of(gate_up.transpose(1, 2))
        for piece in ctx.cut:
            here = slice(piece.start, piece.end)
            rows = _rows(piece, source, token_of_row)
            if hidden is None:
                inner = _product(piece, rows, first, source.new_empty(rows.shape[0], gate_up.shape[1]))
            else:
                inner = hidden[here]
            grad = grad_out.index_select(0, _tokens(piece, token_of_row)) if ctx.combine else grad_out[here]
            grad_active = _product(piece, grad, down_matrices, inner.new_empty(inner.shape[0], down.shape[2]))
            gate, up = inner.chunk(2, dim=-1)
            silu = F.silu(gate)
            active = silu * up  # (P, I)
            if weights is not None:
                if grad_weights is not None:
                    grad_weights[here] = torch.linalg.vecdot(grad_active, active)
                scale = weights[here, None]
                grad_active.mul_(scale)
                active.mul_(scale)
            if grad_down is not None:
                _add_outer(piece, grad, active, grad_down)
            grad_inner = torch.empty_like(inner)
            grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
            torch.mul(grad_active, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_active.mul_(up), gate, grad_input=grad_gate)
            if grad_gate_up is not None:
                _add_outer(piece, grad_inner, rows, grad_gate_up)
            if grad_source is not None:
                # `rows` was gathered for this piece alone: its room serves for the gradient too
                into = _product(piece, grad_inner, matrices, rows if sparse else grad_source[here])
                if sparse:
                    _add_rows(grad_source, into, _tokens(piece, token_of_row))
        if grad_source is not None:
            if not sparse:
                grad_source[sum(ctx.counts) :].zero_()
            grad_source = grad_source.to(source.dtype)
        return grad_source, None, grad_gate_up, grad_down, grad_weights, None, None, None


def _piece_rows(gate_up: Tensor) -> int:
    """Rows of a piece: each costs its input, its result, its hidden values and their gradient."""
    _, hidden, width = gate_up.shape
    return max(256, PIECE_BYTES // (2 * (hidden + width) * gate_up.element_size()))


def _sums_like(source: Tensor) -> Tensor:
    """Zeros to add rows up in: at least fp32."""
    return torch.zeros(source.shape, dtype=torch.promote_types(source.dtype, torch.float32), device=source.device)


def _gradient_like(weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Room for a weight's gradient; zeros only for the experts that no row will write."""
    out = torch.empty_like(weight)
    for expert, count in enumerate(counts):
        if not count:
            out[expert].zero_()
    return out


def _tokens(piece: Piece, token_of_row: Tensor | None) -> Tensor:
    assert token_of_row is not None
    return token_of_row[piece.start : piece.end]


def _rows(piece: Piece, source: Tensor, token_of_row: Tensor | None) -> Tensor:
    """(P, D): the piece's input rows."""
    if token_of_row is None:
        return source[piece.start : piece.end]
    return source.index_select(0, _tokens(piece, token_of_row))


def _add_rows(out: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """out[tokens[i]] += rows[i], in the same order every time."""
    if out.device.type == "cpu":
        out.index_add_(0, tokens, rows.to(out.dtype))
        return
    # On a GPU index_add_ adds with atomics, in any order; a bag of sorted rows does not.
    ordered, order = torch.sort(tokens, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(out.shape[0] + 1, device=tokens.device))
    out += F.embedding_bag(order, rows, bounds, mode="sum", include_last_offset=True)


class _Matrices(NamedTuple):
    """A stacked weight, whole and in views of one expert each."""

    whole: Tensor  # (L, inner, wide), any strides
    each: tuple[Tensor, ...]

    @classmethod
    def of(cls, whole: Tensor) -> _Matrices:
        return cls(whole, whole.unbind(0))


def _product(piece: Piece, rows: Tensor, matrices: _Matrices, out: Tensor) -> Tensor:
    """Each expert's rows by its matrix, into `out`."""
    if takes_grouped_mm(rows, matrices.whole):
        return out.copy_(grouped_mm()(rows, matrices.whole, offs=_ends(piece, matrices.whole)))
    for expert, part, into in zip(piece.experts, rows.split(piece.sizes), out.split(piece.sizes), strict=True):
        rows_product(part, matrices.each[expert], into)
    return out


def _add_outer(piece: Piece, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out[expert] = left^T right over the expert's rows; added where an earlier piece began it."""
    if takes_grouped_mm(right, out):
        counts = _counts(piece, out.shape[0])
        out.copy_(zero_where_empty(grouped_mm()(left.t(), right, offs=offsets(counts, out.device)), counts))
        return
    continues = piece.continues
    for expert, a, b in zip(piece.experts, left.split(piece.sizes), right.split(piece.sizes), strict=True):
        outer_product(a, b, out[expert], add=continues)
        continues = False


def _ends(piece: Piece, weight: Tensor) -> Tensor:
    """(L,) int32 on the weight's device: where each expert's rows end in a piece."""
    return offsets(_counts(piece, weight.shape[0]), weight.device)


def _counts(piece: Piece, n_experts: int) -> tuple[int, ...]:
    """Rows of each expert in a piece, zero for those that have none in it."""
    sizes = dict(zip(piece.experts, piece.sizes, strict=True))
    return tuple(sizes.get(expert, 0) for expert in range(n_experts))
