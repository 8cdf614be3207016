"""Turns SIGINT, SIGTERM and SIGHUP into two events: stop gracefully, then stop now."""

import signal
import threading
from types import FrameType, TracebackType

from cluster.flag import StopFlag

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """A context in which the first signal sets `stop` and a second SIGINT sets `force`.

    Python runs signal handlers in the main thread only, so in any other thread this only carries the two events.
    A repeated SIGTERM does not force: schedulers send it to a process and again to its group.

    Args:
        hangup: set by SIGHUP, a terminal that went away, which then does not ask for a stop; None: it does.
    """

    def __init__(
        self, stop: StopFlag | None = None, extra: tuple[signal.Signals, ...] = (), hangup: StopFlag | None = None
    ) -> None:
        self.stop = stop or StopFlag()
        self.hangup = hangup
        self.force = StopFlag()
        self.name = ""  # of the signal that asked first
        self._signals = STOP_SIGNALS + extra
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def install(self) -> None:
        """Takes the handlers, again where a library has replaced them meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup
            previous = signal.signal(number, self._handle)
            if previous != self._handle:
                self._previous.setdefault(number, previous or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.hangup is not None:
            self.hangup.set()
            return
        if self.stop.is_set() and number == signal.SIGINT:
            self.force.set()
        if not self.name:
            self.name = signal.Signals(number).name
        self.stop.set()
