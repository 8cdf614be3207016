"""Whether Triton's kernels can run on a tensor."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor


def require_triton(op: str, x: Tensor) -> None:
    """Refuse a forced Triton backend where it cannot run.

    Args:
        op: the operation's name, for the message.
        x: an input. On a GPU kernels are compiled; elsewhere they need Triton's interpreter, which is chosen by
            TRITON_INTERPRET=1 before Triton is first imported.

    Raises:
        ValueError
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{op}: backend triton needs the package triton; install it, or use backend reference")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{op}: backend triton cannot run on {x.device}; move the tensors to a GPU, set TRITON_INTERPRET=1 before "
            "starting Python, or use backend reference"
        )
