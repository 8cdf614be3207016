"""Grouped product: every expert multiplies its own contiguous slice of rows by its own weight."""

# D input width, N output width, L local experts, R rows (grouped by expert, ascending), n_used = sum(rows_per_expert)

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kernels.backend import TRITON_DTYPES, has_triton, require_triton, size_class
from kernels.choice import fastest
from kernels.products import outer_product, rows_product

Backend = Literal["auto", "reference", "torch", "triton"]

# torch's grouped product wants strides that are multiples of this many bytes on a GPU.
_ALIGNMENT_BYTES = 16


def grouped_linear(x: Tensor, weight: Tensor, rows_per_expert: Sequence[int], backend: Backend = "auto") -> Tensor:
    """Multiply each expert's slice of rows by the transpose of that expert's weight.

    Measured on one thread of a 2-core AVX512 CPU, torch 2.13, fp32, forward plus backward, medians of 40 in one run,
    milliseconds. `loop` is the reference, `bmm` a batched product (rows padded to the fullest expert where they are
    skewed), `torch` is F.grouped_mm under autograd, itself a loop on a CPU:

         L    D    N  rows          loop    bmm  torch
        16  192  128  8192  even    14.5   13.7   13.7
        16  192  128  8192  skewed  13.9   38.4   13.6
        32  768  896  4096  even     202    201    202
        32  768  896  4096  skewed   206    721    213
        64  256  128   256  even     2.4    1.4    1.8
        64  128   64    64  even     0.6    0.2    0.3

    The batched product wins only where experts are tiny and equally full, which routing never grants. So the CPU takes
    the loop.

    Args:
        x: (R, D), rows of expert 0 first, then of expert 1, and so on. Rows past the last expert's are padding.
        weight: (L, N, D), same dtype as x (under autocast both are cast to its dtype).
        rows_per_expert: L host integers >= 0, their sum at most R. An expert may have no row; R may be 0.
        backend: `reference` is a loop of products, `torch` is torch's grouped_mm, `triton` our kernel (a GPU, or
            Triton's interpreter); `auto` takes the reference on a CPU, and on a GPU the fastest of those that can take
            the input, measured once for each class of shapes (kernels/choice.py).

    Returns:
        (R, N). Padding rows are zero, and so is their gradient.

    Raises:
        ValueError: shapes, dtypes or counts do not fit together, or a forced backend cannot take this input.
    """
    _check(x, weight, rows_per_expert)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_linear: x is {x.dtype} but weight is {weight.dtype}; cast one of them")
    counts = tuple(rows_per_expert)
    product = _PRODUCTS[_resolve(x, weight, counts, backend)]
    return cast(Tensor, _GroupedLinear.apply(x, weight, counts, product))


def _check(x: Tensor, weight: Tensor, rows_per_expert: Sequence[int]) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; "
            "x must be (R, D) and weight (L, N, D)"
        )
    if len(rows_per_expert) != weight.shape[0]:
        raise ValueError(
            f"grouped_linear: {len(rows_per_expert)} row counts for {weight.shape[0]} experts; give one count for each"
        )
    if min(rows_per_expert, default=0) < 0 or sum(rows_per_expert) > x.shape[0]:
        raise ValueError(
            f"grouped_linear: rows_per_expert {tuple(rows_per_expert)} must be >= 0 and sum to at most the "
            f"{x.shape[0]} rows given"
        )


def _resolve(x: Tensor, weight: Tensor, counts: tuple[int, ...], backend: Backend) -> str:
    """The name of the products to take; refuses what cannot run."""
    if backend == "triton":
        require_triton("grouped_linear", x)
    elif backend == "torch":
        if not _aligned(x, weight):
            raise ValueError(
                f"grouped_linear: backend torch needs widths {tuple(weight.shape[1:])} that are multiples of "
                f"{_ALIGNMENT_BYTES} bytes in {x.dtype}; pad them or use backend reference"
            )
    elif backend == "auto":
        if not x.is_cuda:
            return "reference"
        return fastest("grouped_linear", _shape_class(x, weight), x, _trial(x, weight, counts), _able(x, weight))
    elif backend != "reference":
        raise ValueError(f"grouped_linear: unknown backend {backend!r}; use auto, reference, torch or triton")
    return backend


def _aligned(x: Tensor, weight: Tensor) -> bool:
    return all(width * x.element_size() % _ALIGNMENT_BYTES == 0 for width in weight.shape[1:])


def takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped kernel of its own for these on this device, that was seen to be right there.

    On GPUs other than Hopper and Blackwell's large ones (compute capability 9 and 10) torch 2.13 copies the offsets to
    the host and runs a loop of products (aten/src/ATen/native/GroupedMMUtils.h): our own loop has the counts already.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or not _aligned(x, weight):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10) and _grouped_mm_is_right(x.device)


@functools.cache
def _grouped_mm_is_right(device: torch.device) -> bool:
    """Whether torch's grouped product agrees with a loop here, experts without rows among the others."""
    generator = torch.Generator().manual_seed(0)
    counts = (5, 0, 19, 8, 0)
    x = torch.randn(sum(counts), 32, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(len(counts), 64, 32, generator=generator).to(device, torch.bfloat16)
    try:
        pairs = [(_Torch.rows(x, weight, counts, True), _Loop.rows(x, weight, counts, True))]
        pairs.append((_Torch.weights(pairs[0][1], x, counts), _Loop.weights(pairs[0][1], x, counts)))
        right = all(torch.allclose(one.float(), other.float(), rtol=2e-2, atol=0.5) for one, other in pairs)
        fault = "" if right else "its result differs from a loop of products"
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it raises, the loop is there)
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    if fault:
        warnings.warn(f"torch's grouped_mm is not used on {device}: {fault}", stacklevel=2)
    return not fault


def _able(x: Tensor, weight: Tensor) -> list[str]:
    """The backends that can take an input on a GPU."""
    able = ["reference"]
    if takes_grouped_mm(x, weight):
        able.append("torch")
    if has_triton() and x.dtype in TRITON_DTYPES:
        able.append("triton")
    return able


def _shape_class(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    return size_class(x.shape[0]), *weight.shape


def _trial(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Callable[[str], list[Tensor]]:
    """Forward and both gradients on the backend of a name."""

    def run(name: str) -> list[Tensor]:
        product = _PRODUCTS[name]
        with torch.no_grad():
            out = product.rows(x, weight, counts, transpose=True)
            return [out, product.rows(out, weight, counts, transpose=False), product.weights(out, x, counts)]

    return run


class _Loop:
    """One product for each expert that has rows, straight into slices of the result: no copy, no padding."""

    @staticmethod
    def rows(x: Tensor, weight: Tensor, counts: tuple[int, ...], transpose: bool) -> Tensor:
        """(R, D) by weight (L, N, D) -> (R, N), or (R, N) -> (R, D) when not transposed."""
        matrices = (weight.transpose(1, 2) if transpose else weight).unbind(0)
        out = x.new_empty(x.shape[0], matrices[0].shape[1])
        *slices, rest = zip(_split(x, counts), _split(out, counts), strict=True)
        for (rows, result), matrix in zip(slices, matrices, strict=True):
            if rows.shape[0]:
                rows_product(rows, matrix, result)
        rest[1].zero_()
        return out

    @staticmethod
    def weights(grad: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(R, N) and (R, D) -> (L, N, D): each expert's sum of outer products; zero for an expert with no row."""
        out = x.new_empty(len(counts), grad.shape[1], x.shape[1])
        *slices, _ = zip(_split(grad, counts), _split(x, counts), strict=True)
        for (grads, rows), result in zip(slices, out.unbind(0), strict=True):
            if rows.shape[0]:
                outer_product(grads, rows, result, add=False)
            else:
                result.zero_()
        return out


def _split(x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Each expert's slice, and last the padding rows."""
    return x.split([*counts, x.shape[0] - sum(counts)])


class _Torch:
    """torch's grouped_mm: one launch for all experts on a GPU."""

    @staticmethod
    def rows(x: Tensor, weight: Tensor, counts: tuple[int, ...], transpose: bool) -> Tensor:
        width = weight.shape[1] if transpose else weight.shape[2]
        if not sum(counts):
            return x.new_zeros(x.shape[0], width)
        matrix = weight.transpose(-2, -1) if transpose else weight
        out = grouped_mm()(x.contiguous(), matrix, offs=offsets(counts, x.device))
        out[sum(counts) :].zero_()  # rows past the last offset are uninitialised memory
        return out

    @staticmethod
    def weights(grad: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        if not sum(counts):
            return x.new_zeros(len(counts), grad.shape[1], x.shape[1])
        used = sum(counts)
        out = grouped_mm()(grad[:used].contiguous().t(), x[:used].contiguous(), offs=offsets(counts, x.device))
        return zero_where_empty(out, counts)


class _Triton:
    """Our kernels."""

    @staticmethod
    def rows(x: Tensor, weight: Tensor, counts: tuple[int, ...], transpose: bool) -> Tensor:
        from kernels.grouped_mm_triton import rows_on_device, rows_product

        return rows_product(x, weight, rows_on_device(counts, x.shape[0], x.device), transpose)

    @staticmethod
    def weights(grad: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        from kernels.grouped_mm_triton import rows_on_device, weights_product

        return weights_product(grad, x, rows_on_device(counts, x.shape[0], x.device))


_Product = type[_Loop] | type[_Torch] | type[_Triton]
_PRODUCTS: dict[str, _Product] = {"reference": _Loop, "torch": _Torch, "triton": _Triton}


def grouped_mm() -> Callable[..., Tensor]:
    """torch's grouped product, by whichever name this version has it."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return cast(Callable[..., Tensor], public if public is not None else torch._grouped_mm)


def zero_where_empty(out: Tensor, counts: Sequence[int]) -> Tensor:
    """out (L, ...) with zeros for the experts without rows, in place: torch's grouped product leaves their parts as
    they were on some GPUs (pytorch issue 172439)."""
    empty = [expert for expert, count in enumerate(counts) if not count]
    if empty:
        out.index_fill_(0, torch.tensor(empty, device=out.device), 0.0)
    return out


def offsets(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(L,) int32 on the device: where each expert's rows end."""
    ends, total = [], 0
    for count in counts:
        total += count
        ends.append(total)
    host = torch.tensor(ends, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class _GroupedLinear(torch.autograd.Function):
    """Saves the parameter itself, not a view of it, so that a sharding engine may free and refill its storage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], product: _Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.product = counts, product
        return product.rows(x, weight, counts, transpose=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.product.rows(grad, weight, ctx.counts, transpose=False)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.product.weights(grad, x, ctx.counts)
        return grad_x, grad_weight, None, None
