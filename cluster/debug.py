"""The debug launcher: the entry runs in this very process and main thread, where breakpoint() works."""

import signal
import sys
import threading
from types import FrameType

from cluster.context import LaunchResult, RankContext
from cluster.entry import encode, run_entry
from cluster.flag import StopFlag
from cluster.outcome import conclude


def run(entry: str, payload: dict, *, stop: StopFlag | None = None, generation: int = 0) -> LaunchResult:
    """Runs the entry as the only rank of a world of one.

    The first Ctrl-C (or SIGTERM) sets context.stop, a second Ctrl-C raises KeyboardInterrupt. A debugger that takes
    over SIGINT while it stops at a breakpoint keeps working, because its own handler is put back when it continues.
    """
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
