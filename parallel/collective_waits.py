"""How long a rank stands in DeepSpeed's collectives on a CPU, where they block: waiting for others, and the transfer.

On a GPU a collective returns before it is done, and what it keeps waiting is a stream; nothing is counted there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier",
)  # fmt: skip


@dataclass
class Waits:
    """seconds: stood still so far, all collectives together."""

    seconds: float = 0.0

    def during(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Makes the call and counts its time."""
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


class _Handle:
    """A collective under way, whose `wait` is counted; else as it is."""

    def __init__(self, work: Any, waits: Waits) -> None:
        self._work, self._waits = work, waits

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._waits.during(self._work.wait, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def count_waits(backend: Any) -> Waits:
    """Counts the time in a backend's collectives from now on; asked again, it returns the same counter.

    Args:
        backend: `deepspeed.comm.comm.cdb`, the object that all of DeepSpeed's collectives go through.
    """
    known = getattr(backend, "counted_waits", None)
    if known is not None:
        return known
    waits = Waits()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            work = waits.during(call, *args, **kwargs)
            return _Handle(work, waits) if hasattr(work, "wait") else work

        return collective

    for name in NAMES:
        call = getattr(backend, name, None)
        if callable(call):
            setattr(backend, name, counted(call))
    backend.counted_waits = waits
    return waits
