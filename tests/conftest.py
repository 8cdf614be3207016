"""What holds for every test: signals reach the processes that tests start, wherever the suite itself was started."""

import signal


def pytest_configure() -> None:
    """A shell's background, and nohup, have processes ignore these, and what they start inherits that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
