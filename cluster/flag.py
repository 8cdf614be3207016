"""A flag that signal handlers may set."""

import time

_LOOK_S = 0.02


class StopFlag:
    """False until it is set, then true for good.

    threading.Event takes a lock to be set. A handler runs between any two instructions of the main thread, also of
    another handler: where these hold that lock, setting an Event waits for ever. `timeout` and schedulers send a signal
    to a process and at once to its group. Here there is no lock, and whoever waits looks again and again.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Safe anywhere."""
        self._is_set = True

    def is_set(self) -> bool:
        """Whether it has been set."""
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Returns once it is set or after timeout_s; whether it is set."""
        deadline = time.monotonic() + timeout_s
        while not self._is_set and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left))
        return self._is_set
