"""Processes that never outlive the one that started them, finding everything that a process has started, and sparing a
process the searches for cycles while it starts and when it ends."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent_pid: int) -> None:
    """Asks Linux to kill this process when its parent ends, however that happens; elsewhere only the pipe helps.

    The kernel means the thread that started this process, so that thread has to stay until its children are gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the request was in place
        os._exit(1)


def watch_pipe(fd: int, on_line: Callable[[str], None], on_end: Callable[[], None]) -> threading.Thread:
    """Reads commands, one a line, in a background thread; the end of the pipe means that its writer is gone."""

    def follow() -> None:
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as pipe:
            pending = b""
            while data := pipe.read(4096):
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    on_line(line.decode("utf-8", errors="replace"))
        on_end()

    thread = threading.Thread(target=follow, name="parent-pipe", daemon=True)
    thread.start()
    return thread


def watch_parent(parent_pid: int, on_end: Callable[[], None], period_s: float = 0.5) -> threading.Thread:
    """Calls on_end once this process has another parent than parent_pid, for parents that give it no pipe."""

    def look() -> None:
        while os.getppid() == parent_pid:
            time.sleep(period_s)
        on_end()

    thread = threading.Thread(target=look, name="parent-watch", daemon=True)
    thread.start()
    return thread


def kill_own_group() -> None:
    """Ends this process and everything it started in its own session, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def signal_group(pid: int, number: int) -> bool:
    """Sends a signal to the process group that pid leads; False when the group is gone."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS reports a group of zombies as not permitted
        return False
    return True


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return sys.platform != "linux"
    return state not in ("Z", "X")


def adopt_orphans() -> None:
    """Makes this process the new parent of every orphan among its descendants, so that none is lost sight of (Linux).

    It has to reap them too: `reap`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap() -> dict[int, int]:
    """Takes leave of every child that has ended, so that none stays as a zombie; exit status (-n: signal n) by id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def descendants(pid: int, mark: str = "") -> list[int]:
    """Ids of the living processes that pid started, directly or through others.

    Args:
        mark: "NAME=value" in their environment. Where orphans cannot be adopted (not Linux), processes of pid's
            group and those with the mark count as well.
    """
    if sys.platform == "linux":
        parents = {child: parent for child in _linux_pids() if (parent := _linux_parent(child)) is not None}
        return [child for child in _below(pid, parents) if is_alive(child)]
    listing = subprocess.run(
        ["ps", "-axEww", "-o", "pid=,ppid=,pgid=,command="], capture_output=True, text=True, check=False
    )
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    found = set(_below(pid, {int(row[0]): int(row[1]) for row in rows}))
    found |= {int(row[0]) for row in rows if int(row[2]) == pid or (mark and mark in row[3])}
    return sorted(found - {pid, os.getpid()})


def end_processes(find: Callable[[], Iterable[int]], grace_s: float, kill_s: float = 5.0) -> list[int]:
    """Asks what `find` reports to end, kills what is left after grace_s, returns what is left after kill_s more."""
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, kill_s)):
        deadline = time.monotonic() + patience
        asked: set[int] = set()
        while pids := list(find()):
            for pid in set(pids) - asked:
                asked.add(pid)
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return []
    return list(find())


def _linux_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _linux_parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended meanwhile
        return None


def _below(root: int, parents: Mapping[int, int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found, open_ends = [], [root]
    while open_ends:
        for child in children.get(open_ends.pop(), []):
            found.append(child)
            open_ends.append(child)
    return found


def about_to_end() -> None:
    """To be called last: spares the interpreter the search for cycles among all of torch's objects, about a second."""
    gc.freeze()


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nobody searches for cycles: importing torch and its like makes objects by the hundred thousand, which all
    stay, and to search them again and again takes a third of the import's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
