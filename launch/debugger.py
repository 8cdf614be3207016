"""`breakpoint()` in a run with virtual ranks: one thread talks to the terminal at a time, and says which rank it is."""

import pdb
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_TERMINAL = threading.RLock()


class RankPdb(pdb.Pdb):
    """pdb whose prompt names the thread (rank-1, rank-2 ...; MainThread is rank 0) and which waits its turn.

    `q` at one rank's prompt quits all of them: `left` is shared by the debuggers of one run.
    """

    def __init__(self, left: threading.Event) -> None:
        super().__init__(nosigint=threading.current_thread() is not threading.main_thread())
        self._left = left

    def interaction(self, frame: FrameType | None, tb_or_exc: TracebackType | BaseException | None) -> None:  # type: ignore[override]
        """Holds the terminal while somebody types."""
        with _TERMINAL:
            if self._left.is_set():
                self.set_quit()
                return
            name = threading.current_thread().name
            self.prompt = f"(Pdb {'rank-0' if name == 'MainThread' else name}) "
            super().interaction(frame, tb_or_exc)  # type: ignore[arg-type]
            if self.quitting:
                self._left.set()


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """Makes `breakpoint()` open a `RankPdb`, unless a debugger of the user's own is configured."""
    previous = sys.breakpointhook
    if previous is not sys.__breakpointhook__:
        yield
        return
    left = threading.Event()

    def hook(*args: object, **kwargs: object) -> None:
        RankPdb(left).set_trace(sys._getframe(1))

    sys.breakpointhook = hook
    try:
        yield
    finally:
        sys.breakpointhook = previous
