"""One driver at a time in a run's folder: two would write one history.

A file lock (flock) holds the folder and is let go by the system when its process dies. Storage without such locks
(Lustre mounted without -o flock, some FUSE file systems) gets a lease instead: a file that names host, boot, process
and time, and that its holder renews. Whether another one's lease is fresh is told by the storage's own clock.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.config import ConfigError

RENEW_S = 10.0
FRESH_S = 60.0  # a lease that was not renewed for so long is of a process that died


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def only_driver(folder: Path, say: Callable[[str], None] = _say) -> Iterator[None]:
    """Holds the run's folder until the block ends; a process that dies lets go of it, a lease after `FRESH_S`.

    Args:
        say: is told once where the folder cannot be locked, and when a lease was lost.

    Raises:
        ConfigError: another process holds it; says which. Or its files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".driver", "a+")  # noqa: SIM115 - closed below, whatever happens
    except OSError as error:
        raise ConfigError([f"run folder {folder} cannot be written: {error}; give another --run"]) from error
    with file, contextlib.ExitStack() as held:
        try:
            _lock(file.fileno())
        except BlockingIOError:
            file.seek(0)
            raise ConfigError([_taken(folder, file.read().strip() or "another process")]) from None
        except OSError as error:
            say(
                f"run: {folder} is on storage that cannot lock files ({error.strerror or error}); "
                f"{folder / Lease.NAME} keeps a second driver out instead, renewed every {RENEW_S:g} s"
            )
            held.enter_context(Lease(folder, say))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(handle: int) -> None:
    """Raises: BlockingIOError where another process has the lock, OSError where there are no locks."""
    try:
        import fcntl
    except ImportError as error:  # not on this system
        raise OSError(0, str(error)) from error
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _taken(folder: Path, holder: str, more: str = "") -> str:
    return f"run folder {folder} is being trained into by {holder}; {more}wait for it, stop it, or give another --run"


class Lease:
    """A context that holds a folder by a file.

    Args:
        folder: of the run. say: is told when somebody else took the lease away.
    """

    NAME = ".driver.lease"

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.path, self.say = folder, folder / self.NAME, say
        self.own: dict[str, Any] = {
            "host": socket.gethostname(), "boot": _boot_id(), "process": os.getpid(), "key": uuid.uuid4().hex,
        }  # fmt: skip
        self._draft = folder / f"{self.NAME}.{self.own['key'][:8]}"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="trimtab-lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Raises: ConfigError where another one's lease is fresh."""
        try:
            self._write()
            try:
                os.link(self._draft, self.path)  # fails where there is one
            except FileExistsError:
                self._take_over()
            except OSError:  # storage without links
                if self.path.exists():
                    self._take_over()
                else:
                    os.replace(self._draft, self.path)
            time.sleep(0.2)  # two that found the same stale lease have both written by now
            if (now := _read(self.path)).get("key") != self.own["key"]:
                raise ConfigError([_taken(self.folder, _name(now))])
        finally:
            self._draft.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(5.0)
        if _read(self.path).get("key") == self.own["key"]:
            self.path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        there = _read(self.path)
        try:
            age = self._draft.stat().st_mtime - self.path.stat().st_mtime  # both by the clock of the storage
        except FileNotFoundError:
            age = FRESH_S
        dead = (
            (there.get("host"), there.get("boot")) == (self.own["host"], self.own["boot"])
            and not _alive(int(there.get("process", 0)))
        )  # fmt: skip
        if age < FRESH_S and not dead:
            more = f"its lease was renewed {max(0.0, age):.0f} s ago and counts for {FRESH_S:g} s: "
            raise ConfigError([_taken(self.folder, _name(there), more)])
        os.replace(self._draft, self.path)

    def _write(self) -> None:
        text = json.dumps({**self.own, "renewed": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n"
        self._draft.write_text(text, encoding="utf-8")

    def _keep(self) -> None:
        while not self._end.wait(RENEW_S):
            try:
                there = _read(self.path)
                if there and there.get("key") != self.own["key"]:
                    self.say(
                        f"run: {self.folder} was taken over by {_name(there)}, which found this process' lease "
                        "too old: two processes write into it now, stop one of them"
                    )
                    return
                self._write()
                os.replace(self._draft, self.path)
            except OSError:  # the storage is away for a moment; the next time counts
                continue


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(lease: dict[str, Any]) -> str:
    return f"process {lease['process']} on {lease['host']}" if "process" in lease else "another process"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process > 0


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
