"""What `breakpoint()`, pdb and `input()` do in a rank that has no terminal: they say where there is one, and stop."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class NoTerminalError(RuntimeError):
    """Somebody asked for input in a rank that nobody can type to."""


class NoTerminal:
    """Standard input of such a rank: to read from it raises."""

    def __init__(self, rank: int, launcher: str) -> None:
        self._rank, self._launcher = rank, launcher

    def error(self, where: str) -> NoTerminalError:
        """The error for a place, such as "breakpoint() at file.py:12"."""
        return NoTerminalError(
            f"{where}: rank {self._rank} has no terminal under --launcher {self._launcher}; use --launcher debug, "
            "where breakpoint() works in every rank (parallel.virtual_ranks plays several), or name a debugger that "
            "waits for a connection in the variable PYTHONBREAKPOINT"
        )

    def readline(self, size: int = -1) -> str:
        """Raises: NoTerminalError."""
        raise self.error("input was asked for, by pdb or input()")

    read = readline

    def fileno(self) -> int:
        """Raises: OSError, as a stream without a file does."""
        raise OSError("a rank's standard input is no file")

    def isatty(self) -> bool:
        """False."""
        return False

    def breakpoint(self, *args: object, **kwargs: object) -> None:
        """Takes the place of `sys.breakpointhook`. Raises: NoTerminalError with the caller's place."""
        frame = sys._getframe(1)
        raise self.error(f"breakpoint() at {frame.f_code.co_filename}:{frame.f_lineno}")


@contextmanager
def without_terminal(rank: int, launcher: str) -> Iterator[None]:
    """Inside, asking for input raises NoTerminalError; a debugger that PYTHONBREAKPOINT names is left alone."""
    stdin, hook = sys.stdin, sys.breakpointhook
    nothing = NoTerminal(rank, launcher)
    sys.stdin = nothing  # type: ignore[assignment]
    if hook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT"):
        sys.breakpointhook = nothing.breakpoint
    try:
        yield
    finally:
        sys.stdin, sys.breakpointhook = stdin, hook
