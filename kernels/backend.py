"""Which backend runs an operation: resolved once a call, from its name, the tensor and what was measured."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton"]
# The dtypes that the kernels are written for.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


def require_triton(op: str, x: Tensor) -> None:
    """Refuse a forced Triton backend where it cannot run.

    Args:
        op: the operation's name, for the message.
        x: an input. On a GPU kernels are compiled; elsewhere they need Triton's interpreter, which is chosen by
            TRITON_INTERPRET=1 before Triton is first imported.

    Raises:
        ValueError
    """
    if not has_triton():
        raise ValueError(f"{op}: backend triton needs the package triton; install it, or use backend reference")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{op}: backend triton cannot run on {x.device}; move the tensors to a GPU, set TRITON_INTERPRET=1 before "
            "starting Python, or use backend reference"
        )
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{op}: backend triton takes float32, float16 and bfloat16, not {x.dtype}; cast, or use backend reference"
        )


def resolve(
    op: str, backend: str, x: Tensor, run: Callable[[str], Sequence[Tensor]], shape_class: tuple[object, ...]
) -> Literal["reference", "triton"]:
    """The backend that an operation takes.

    Args:
        op: its name, for messages and for the record of measurements.
        backend: what the caller asked for. `auto` is the reference on a CPU, without measuring; on a GPU the faster of
            the two, measured at the first call of a shape class (kernels/choice.py).
        x: an input, whose device and dtype count.
        run: runs the operation, forward and backward, on the backend of that name; called on a GPU only.
        shape_class: what the speed depends on besides dtype and device.

    Raises:
        ValueError: unknown, or forced and impossible.
    """
    if backend == "auto":
        if not x.is_cuda or not has_triton() or x.dtype not in TRITON_DTYPES:
            return "reference"
        from kernels.choice import fastest

        return cast(Literal["reference", "triton"], fastest(op, shape_class, x, run, ("reference", "triton")))
    if backend == "triton":
        require_triton(op, x)
        return "triton"
    if backend != "reference":
        raise ValueError(f"{op}: unknown backend {backend!r}; use auto, reference or triton")
    return "reference"


def size_class(n: int) -> int:
    """The power of two at or above n: sizes that vary from step to step share what was measured."""
    return 1 << max(0, n - 1).bit_length()
