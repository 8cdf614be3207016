"""Training outlives whoever reads its output: `| head`, a tee that was killed, a terminal that went away."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

CLOSED = "standard output was closed by its reader; the run goes on, its figures are in metrics.jsonl and report.md"


class LastingStream:
    """A text stream in front of another that is quiet from the moment on in which nobody reads that any more.

    The descriptor then leads to os.devnull, so that libraries, and Python at its end, do not fail either.

    Attributes:
        lost: whether that has happened.
    """

    def __init__(self, stream: TextIO, notice: str = "") -> None:
        self._stream, self._notice = stream, notice
        self.lost = False

    def write(self, text: str) -> int:
        """Takes a piece of text."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._lose()
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Takes several."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Sends out what waits."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self) -> None:
        first, self.lost = not self.lost, True
        with suppress(OSError, ValueError, AttributeError):  # a stream in memory has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        with suppress(BrokenPipeError):
            self._stream.flush()
        if first and self._notice:
            print(f"trimtab: {self._notice}", file=sys.stderr, flush=True)


def open_missing_streams() -> None:
    """Gives a process that was started without standard input, output or error (`>&-`) os.devnull in their place.

    Otherwise the next file that anybody opens gets the free number, and is printed into.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside, a closed standard output or error is told once, on the other one, and is no error."""
    before = sys.stdout, sys.stderr
    sys.stderr = LastingStream(sys.stderr)  # type: ignore[assignment]
    sys.stdout = LastingStream(sys.stdout, CLOSED)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def output_was_lost() -> bool:
    """Whether nobody reads this process' standard output any more."""
    return bool(getattr(sys.stdout, "lost", False))
