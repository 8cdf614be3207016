"""Rows as they travel: cast to the payload's dtype, with what belongs to each row behind it in one record of bytes."""

# P records, D hidden

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.wire import PayloadName

_FP8_MAX = 448.0  # the largest number of float8_e4m3fn
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


def pack(rows: Tensor, form: Form, *trailers: Tensor) -> Tensor:
    """Writes records.

    Args:
        rows: (P, D).
        trailers: (P, n) each, of 4-byte numbers.

    Returns:
        (P, D) in the form's dtype where nothing follows the rows, otherwise (P, bytes) uint8.
    """
    if form.scaled:
        scale = rows.detach().abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _FP8_MAX  # (P, 1)
        rows = (rows / scale).to(form.dtype)
        trailers = (scale, *trailers)
    else:
        rows = rows.to(form.dtype)
    if not trailers:
        return rows
    parts = [_bytes(rows)]
    if parts[0].shape[1] % _WORD:
        parts.append(parts[0].new_zeros(rows.shape[0], -parts[0].shape[1] % _WORD))
    return torch.cat([*parts, *map(_bytes, trailers)], dim=1)


def _bytes(rows: Tensor) -> Tensor:
    """(P, n) -> (P, bytes) uint8; flattened on the way, since a dimension of size 1 may have any stride."""
    return rows.reshape(-1).view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.element_size())


def unpack(
    records: Tensor, form: Form, hidden: int, compute: torch.dtype, *trailers: tuple[int, torch.dtype]
) -> tuple[Tensor, ...]:
    """Reads what `pack` wrote.

    Args:
        hidden: D.
        compute: dtype of the rows returned.
        trailers: width and 4-byte dtype of each trailer.

    Returns:
        (P, D) contiguous rows, then each trailer (P, n).
    """
    if not trailers and not form.scaled:
        return (records.to(compute),)
    end = hidden * form.dtype.itemsize
    rows = records[:, :end].view(form.dtype)
    start = -(-end // _WORD) * _WORD
    found = []
    for width, dtype in ((1, torch.float32), *trailers) if form.scaled else trailers:
        stop = start + width * _WORD
        found.append(records[:, start:stop].view(dtype))
        start = stop
    if form.scaled:
        scale, *found = found
        return (rows.to(compute) * scale.to(compute), *found)
    return (rows.to(compute).contiguous(), *found)
