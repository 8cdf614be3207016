"""Rank logs: where they are, sending a process's output there, and reading what was added since the last look."""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from cluster.redact import guard_output, redact

CHUNK_BYTES = 1 << 20
_START = "--- start of rank "


def rank_log(log_dir: Path, rank: int) -> Path:
    """The file that keeps everything a rank prints."""
    return Path(log_dir) / f"rank-{rank}.log"


def begin_log(path: Path, rank: int, generation: int) -> int:
    """Makes a rank's log; where an earlier start has left one, it stays, and a line says which start follows.

    Args:
        generation: 0 for a launch, from 1 on its restarts.

    Returns:
        The file's size, where the output of this start begins.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return 0
        torn = os.pread(fd, 1, size - 1) != b"\n"
        now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
        what = f"restart {generation}" if generation else "launch"
        line = f"{_START}{rank}, {what}, {now}, by process {os.getpid()} on {host}\n"
        os.write(fd, b"\n" * torn + line.encode())
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


class LogTail:
    """Follows one growing file; returns whole lines, and the unfinished last line only on request."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = Path(path)
        self.offset = offset
        self._partial = b""

    def read(self, everything: bool = False) -> str:
        """The lines added since the last call, at most about 1 MiB; with `everything` all, a partial line too."""
        data = self._partial + self._next_bytes(None if everything else CHUNK_BYTES)
        cut = len(data) if everything else data.rfind(b"\n") + 1
        self._partial = data[cut:]
        return data[:cut].decode("utf-8", errors="replace")

    def _next_bytes(self, limit: int | None) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read() if limit is None else file.read(limit)
        except FileNotFoundError:
            return b""
        self.offset += len(data)
        return data


def last_lines(path: Path, count: int = 20) -> str:
    """The end of a log for an error message, of the last start alone; "" when there is nothing."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(_START)]
    return redact("\n".join(lines[starts[-1] + 1 if starts else 0 :][-count:]))


def redirect_output(path: Path | str, append: bool) -> None:
    """Sends everything that this process prints to a file, crash reports and libraries' messages included.

    What Python code prints goes there without secrets.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if append else os.O_TRUNC), 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    faulthandler.enable(file=sys.stderr)
    guard_output()


class KeptOutput:
    """A context in which this process's output goes to a file, and with `stream` also to where it went before."""

    def __init__(self, path: Path, *, append: bool, stream: bool) -> None:
        self._path, self._append, self._stream = path, append, stream
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "KeptOutput":
        self._streams = (sys.stdout, sys.stderr)
        self._saved = (os.dup(1), os.dup(2))
        start = self._path.stat().st_size if self._append and self._path.exists() else 0
        redirect_output(self._path, self._append)
        if self._stream:
            self._thread = threading.Thread(target=self._copy, args=(LogTail(self._path, start),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._done.set()
        if self._thread:
            self._thread.join()
        for number, saved in enumerate(self._saved, start=1):
            os.dup2(saved, number)
            os.close(saved)
        sys.stdout, sys.stderr = self._streams

    def _copy(self, tail: LogTail) -> None:
        finished = False
        while not finished:
            finished = self._done.wait(0.05)
            data = tail.read(everything=finished).encode()
            try:
                while data:
                    data = data[os.write(self._saved[0], data) :]
            except BrokenPipeError:  # nobody reads it any more; the log has it all
                return
