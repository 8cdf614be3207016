"""Rows as they travel: cast to the payload's dtype, with what belongs to each row behind it in one record of bytes."""

# P records, D hidden

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import dequantize_rows, quantize_rows
from parallel.wire import PayloadName

_WORD = 4


@dataclass(frozen=True)
class Form:
    """How rows are written. dtype: of the numbers on the wire. scaled: with one fp32 scale a row (fp8)."""

    dtype: torch.dtype
    scaled: bool = False


def forms(payload: PayloadName, compute: torch.dtype) -> tuple[Form, Form]:
    """The form of tokens that go out, and that of everything else (results and both gradients).

    fp8 is for tokens only, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): a sum of results or of gradients loses
    more in 3 bits of mantissa than the bytes are worth.
    """
    if payload == "fp8":
        return Form(torch.float8_e4m3fn, scaled=True), Form(torch.bfloat16)
    dtype = {"auto": compute, "fp32": torch.float32, "bf16": torch.bfloat16}[payload]
    return Form(dtype), Form(dtype)


def pack(rows: Tensor, form: Form, *trailers: Tensor, index: Tensor | None = None) -> Tensor:
    """Writes records.

    Args:
        rows: (P, D), or any number of rows where `index` says which are meant.
        trailers: (P, n) each, of 4-byte numbers.
        index: (P,) int64, or None for all rows in order.

    Returns:
        (P, D) in the form's dtype where nothing follows the rows, otherwise (P, bytes) uint8.
    """
    if form.scaled:
        values, scales = quantize_rows(rows if index is None else rows.index_select(0, index))
        return _records(form, values, None, (scales[:, None], *trailers))
    rows = rows.to(form.dtype)  # before rows are copied out: fewer bytes
    if trailers:
        return _records(form, rows, index, trailers)
    return rows if index is None else rows.index_select(0, index)


def _records(form: Form, rows: Tensor, index: Tensor | None, trailers: tuple[Tensor, ...]) -> Tensor:
    """(P, bytes) uint8: each row once copied, straight to its place."""
    n_records = rows.shape[0] if index is None else index.shape[0]
    end = rows.shape[1] * form.dtype.itemsize
    start = -(-end // _WORD) * _WORD
    width = start + _WORD * sum(trailer.shape[1] for trailer in trailers)
    records = torch.empty(n_records, width, dtype=torch.uint8, device=rows.device)
    records[:, end:start] = 0
    place = records[:, :end].view(form.dtype)
    if index is None:
        place.copy_(rows)
    else:
        torch.index_select(rows, 0, index, out=place)
    for trailer in trailers:
        stop = start + _WORD * trailer.shape[1]
        records[:, start:stop].view(trailer.dtype).copy_(trailer)
        start = stop
    return records


def unpack(records: Tensor, form: Form, into: Tensor, *trailers: tuple[int, torch.dtype]) -> list[Tensor]:
    """Reads what `pack` wrote.

    Args:
        into: (P, D), takes the rows, in its own dtype.
        trailers: width and 4-byte dtype of each trailer.

    Returns:
        Each trailer (P, n).
    """
    if not trailers and not form.scaled:
        into.copy_(records)
        return []
    end = into.shape[1] * form.dtype.itemsize
    rows = records[:, :end].view(form.dtype)
    start = -(-end // _WORD) * _WORD
    found = []
    for width, dtype in ((1, torch.float32), *trailers) if form.scaled else trailers:
        stop = start + width * _WORD
        found.append(records[:, start:stop].view(dtype))
        start = stop
    if form.scaled:
        scale, *found = found
        into.copy_(dequantize_rows(rows.contiguous(), scale[:, 0].contiguous(), into.dtype))
    else:
        into.copy_(rows)
    return found


def keep(rows: Tensor, form: Form, into: Tensor, index: Tensor | None = None) -> None:
    """Copies rows that stay on their rank, with the rounding of the wire: a result must not depend on which of a
    token's experts are at home."""
    if not form.scaled and form.dtype == rows.dtype == into.dtype:
        if index is None:
            into.copy_(rows)
        else:
            torch.index_select(rows, 0, index, out=into)
        return
    if form.scaled:
        values, scales = quantize_rows(rows if index is None else rows.index_select(0, index))
        into.copy_(dequantize_rows(values, scales, into.dtype))
        return
    rows = rows.to(form.dtype)
    into.copy_(rows if index is None else rows.index_select(0, index))
