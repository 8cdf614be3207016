"""Products of matrices on a CPU: fp32 through oneDNN where MKL uses half of the processor; bf16 goes there by itself.

MKL runs its AVX2 code on AMD's processors, oneDNN its AVX-512 code: twice the speed in the same precision
(docs/kernels.md). torch asks oneDNN for fp32 products only where it is allowed to round their factors to bf16, which
oneDNN does on processors with tiles for it (AMX) and not on these; that they stay fp32 is tried once before anything
relies on it. oneDNN makes a program for each new shape, 1 to 3 ms and 0.65 MB each, so rows in groups of any length go
to it in few lengths: in training, where groups are many and of like length, `rows_product` and `outer_product` take
eight lengths to a doubling; where lengths are the user's, as in generation, `linear` and `rows_product` take six.
"""

# R rows of a group, K common width, N columns

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Groups of rows come in multiples of so many, at least: see `_step`.
STEP = 16
# Where nobody chose for the whole process: lengths of pieces, and from how many rows and multiplications on oneDNN's
# twofold speed outweighs the 13 us more that a call takes (docs/kernels.md).
PIECES = (8, 16, 32, 64, 128, 256)
LEAST_ROWS = PIECES[0]
LEAST_PRODUCT = 2**21
_SETTINGS: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  (torch puts it there where mypy cannot see it)
_onednn = False  # what was set last; torch takes 2 us to tell


def choose_products() -> bool:
    """Sets this process's fp32 products on CPUs, for training: all through oneDNN where that is better, else MKL.

    Returns:
        Whether they go through oneDNN from now on.
    """
    settle_mkl()
    _through_onednn(onednn_is_better())
    return in_steps()


def onednn_is_better() -> bool:
    """Whether oneDNN is faster and as exact here. It depends on the processor alone, not on a clock, so that a run
    gives the same numbers when it is repeated."""
    return _slow_in_mkl() and stays_exact()


def in_steps() -> bool:
    """Whether fp32 products go through oneDNN, so that groups of rows should have few lengths."""
    return _onednn


@functools.cache
def stays_exact() -> bool:
    """Whether oneDNN leaves fp32 factors as they are: a product with the identity gives back bits that bf16 lacks."""
    with products_through(onednn=True):
        for rows, width in ((64, 256), (512, 64), (1, 512)):
            x = 1 + torch.arange(rows * width, dtype=torch.float32).view(rows, width) * 2.0**-20
            if not torch.equal(x @ torch.eye(width), x) or not torch.equal(torch.eye(rows) @ x, x):
                return False
    return True


def settle_mkl() -> None:
    """Has MKL choose its code for this processor, once, on the calling thread: to be called before threads multiply.

    MKL looks at the processor when it is first asked for something, and keeps what it finds in variables that it writes
    in several steps and without a lock (the code of `mkl_serv_cpuisclx` in torch 2.13 first notes yes and then looks
    again). Two threads whose first products coincide may see what lies between, and one of them then computes that
    product with another kernel, which rounds otherwise.
    """
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(17, 17, dtype=dtype)
        torch.mm(x, x)
        torch.addmm(x, x, x.t())
        torch.bmm(x.expand(2, 17, 17), x.expand(2, 17, 17).transpose(1, 2))
        torch.mv(x, x[0])
        torch.dot(x[0], x[1])
        for function in (torch.exp, torch.log, torch.tanh, torch.cos, torch.sin):  # MKL's vector functions
            function(x)


@contextmanager
def products_through(onednn: bool) -> Iterator[None]:
    """Inside, fp32 products on CPUs go through oneDNN or through MKL, whatever was chosen.

    The setting is the whole process's: not for code that runs in threads side by side.
    """
    before = in_steps()
    if before != onednn:
        _through_onednn(onednn)
    try:
        yield
    finally:
        if before != onednn:
            _through_onednn(before)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T without gradients, for any number of rows. Where nobody chose for the process, large products go
    through oneDNN if that is better, and small ones through MKL.

    Args:
        x: (..., K). weight: (N, K).

    Returns:
        (..., N).
    """
    if not _goes_in_pieces(x, weight):
        return F.linear(x, weight)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _in_pieces(x.reshape(-1, x.shape[-1]), weight.t(), out.view(-1, weight.shape[0]))
    return out


def rows_product(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix, where groups of rows come in any length.

    With oneDNN a group is computed in whole steps and, where rows are left, once more in as many of its last rows as
    are a length of their own:

        R 150, steps of 16:   rows 0..143,  rows 134..149

    In inference mode, where nobody chose for the process, a large product goes the way of `linear`.

    Args:
        rows: (R, K). matrix: (K, N), any strides. out: (R, N), written.
    """
    n_rows = rows.shape[0]
    rest = n_rows % _step(n_rows)
    if torch.is_inference_mode_enabled() and _goes_in_pieces(rows, matrix):
        _in_pieces(rows, matrix, out)
    elif not rest or not _makes_programs(rows):
        torch.mm(rows, matrix, out=out)
    elif n_rows < STEP:
        out.copy_(torch.mm(_filled(rows, _length(n_rows)), matrix)[:n_rows])
    else:
        torch.mm(rows[: n_rows - rest], matrix, out=out[: n_rows - rest])
        last = _length(rest)
        torch.mm(rows[-last:], matrix, out=out[-last:])


def outer_product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out = left^T @ right, or added to it, where groups of rows come in any length; zeros fill what is left of steps.

    In fp32 the steps and what is left are added up; in bf16, where that would round once more, all rows are filled up.

    Args:
        left: (R, K). right: (R, N). out: (K, N), written. add: to what `out` holds.
    """
    n_rows = left.shape[0]
    rest = n_rows % _step(n_rows)
    if rest and _makes_programs(left):
        if n_rows > STEP and left.dtype == torch.float32:
            _outer(left[: n_rows - rest], right[: n_rows - rest], out, add)
            left, right, n_rows, add = left[n_rows - rest :], right[n_rows - rest :], rest, True
        left, right = (_filled(rows, _length(n_rows)) for rows in (left, right))
    _outer(left, right, out, add)


def _makes_programs(rows: Tensor) -> bool:
    """Whether a product of these rows goes through oneDNN, in which each new length is a new program."""
    if rows.device.type != "cpu":
        return False
    return in_steps() if rows.dtype == torch.float32 else rows.dtype == torch.bfloat16 and _bf16_in_onednn()


@functools.cache
def _bf16_in_onednn() -> bool:
    """Whether torch gives bf16 products to oneDNN on this processor, as it does wherever that can compute them."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _step(n_rows: int) -> int:
    """Lengths near n_rows are multiples of this: 16 up to 256, 32 up to 512, 64 up to 1,024; eight to a doubling."""
    return max(STEP, 1 << max(0, n_rows.bit_length() - 4))


def _length(n_rows: int) -> int:
    """The next length."""
    return -(-n_rows // _step(n_rows)) * _step(n_rows)


def _outer(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out.addmm_(left.t(), right)
    else:
        torch.mm(left.t(), right, out=out)


def _goes_in_pieces(rows: Tensor, matrix: Tensor) -> bool:
    """Whether this product is large enough, and the choice left to it."""
    n_rows = rows.numel() // max(1, rows.shape[-1])
    return (
        n_rows >= LEAST_ROWS
        and n_rows * matrix.numel() >= LEAST_PRODUCT
        and not _onednn
        and rows.dtype == matrix.dtype == torch.float32
        and rows.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_better()
    )


def _in_pieces(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix through oneDNN; what the last piece lacks it takes from the rows before:

    R 300:   rows 0..255,  rows 268..299        R 100:   rows 0..63,  rows 36..99
    """
    n_rows, start = rows.shape[0], 0
    with products_through(onednn=True):
        for size in _piece_lengths(n_rows):
            start = min(start, n_rows - size)
            torch.mm(rows[start : start + size], matrix, out=out[start : start + size])
            start += size


def _piece_lengths(n_rows: int) -> list[int]:
    """Of at least LEAST_ROWS rows; descending, none longer than there are rows, together as many or a few more."""
    whole, left = divmod(n_rows, PIECES[-1])
    found = [PIECES[-1]] * whole
    if 0 < left <= 32:
        found.append(next(size for size in PIECES if size >= left))
    else:
        left = -(-left // 32) * 32
        for size in reversed(PIECES):
            if size <= left:
                found.append(size)
                left -= size
    return [found[0] // 2] * 2 if found[0] > n_rows else found


def _filled(rows: Tensor, length: int) -> Tensor:
    """The rows, then zeros up to a length."""
    n_rows = rows.shape[0]
    filled = rows.new_empty(length, rows.shape[1])
    filled[:n_rows] = rows
    filled[n_rows:].zero_()
    return filled


def _through_onednn(wanted: bool) -> None:
    global _onednn
    _onednn = wanted
    _SETTINGS.fp32_precision = "bf16" if wanted else "ieee"


@functools.cache
def _slow_in_mkl() -> bool:
    """Whether MKL has no code of its own for this processor's widest registers: AMD's with AVX-512."""
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
