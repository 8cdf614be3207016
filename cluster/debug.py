"""The debug launcher: the entry runs in this very process and main thread, where breakpoint() works."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.context import LaunchResult, RankContext
from cluster.cores import stated_threads, usable_cores
from cluster.entry import encode, run_entry
from cluster.flag import StopFlag
from cluster.outcome import conclude


def run(
    entry: str, payload: dict, *, stop: StopFlag | None = None, generation: int = 0, threads_per_worker: int = 0
) -> LaunchResult:
    """Runs the entry as the only rank of a world of one.

    The first Ctrl-C (or SIGTERM) sets context.stop, a second Ctrl-C raises KeyboardInterrupt. A debugger that takes
    over SIGINT while it stops at a breakpoint keeps working, because its own handler is put back when it continues.

    Args:
        threads_per_worker: torch's CPU threads meanwhile; 0 leaves them to torch, within a control group's limit.
    """
    with _threads(threads_per_worker):
        return _run(entry, payload, stop, generation)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or (before if stated_threads(os.environ) else min(before, usable_cores())))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(entry: str, payload: dict, stop: StopFlag | None, generation: int) -> LaunchResult:
    text = encode(payload, "the payload")
    context = RankContext(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        n_nodes=1,
        init_method="",
        generation=generation,
        launcher="debug",
        stop=stop or StopFlag(),
    )

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and context.stop.is_set():
            raise KeyboardInterrupt
        context.stop.set()
        print("stopping at the next step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        return conclude([run_entry(entry, text, context)], stop_asked=context.stop.is_set())
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        report = run_entry(entry, text, context)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if "BdbQuit" in report.get("exception", ()):
        report["error"] = "left in the debugger; the same command goes on from the newest checkpoint"
    return conclude([report], stop_asked=context.stop.is_set())
