"""Remote storage: bytes at any fsspec address, with retries, a deadline, and a clear error at its end."""

from __future__ import annotations

import hashlib
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from data.errors import DataError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"([a-z][a-z0-9+]*)://")
# Commands, caches, passwords in the clear, and file systems that lead to whatever address a file of theirs names.
REFUSED = frozenset(
    [
        "pipe",
        "shell",
        "simplecache",
        "filecache",
        "blockcache",
        "cached",
        "reference",
        "generic",
        "dask",
        "jupyter",
        "ftp",
    ]
)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 10.0
_TRY_SHARE = 0.25  # of the deadline, that one try may take before it is given up and begun again

_MISMATCHES = 6  # whole, wrong arrivals of a file after which the storage itself is taken to be damaged

Value = TypeVar("Value")


class StorageError(DataError):
    """The storage did not give what was asked for, within the deadline or at all."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address of remote storage; file:// is a local path."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def local_path(path: str | Path) -> Path:
    """The local path of a path or a file:// address."""
    return Path(path.removeprefix("file://")) if isinstance(path, str) else path


def address_problems(path: str) -> list[str]:
    """Every reason why an address is refused, before anything is opened: chains and commands are never followed."""
    if "://" not in path and "::" not in path and not path.startswith("pipe:"):
        return []
    match = _ADDRESS.match(path)
    if path.startswith("pipe:") or "::" in path or match is None:
        return [f"data.path = {path!r} is not a plain address; use one such as s3://bucket/folder, without :: or pipe:"]
    if match[1] in REFUSED:
        return [f"data.path = {path!r}: {match[1]}:// is not supported; use file, http, https, s3, gs, abfs or memory"]
    return []


def check_name(name: str, where: str) -> str:
    """A file's name from a manifest, if it cannot lead out of its folder.

    Raises:
        DataError: it holds a slash, begins with a dot, or is a command.
    """
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise DataError(f"{where}: names the file {name!r}; only plain names of the same folder are allowed")
    return name


class MissingError(StorageError):
    """The storage says that there is no such file, or that it must not be read."""


class _ContentError(Exception):
    """What arrived is whole and cannot be right: damaged on its way, or in the storage."""


class Storage:
    """The files of one remote folder.

    Args:
        address: of the folder, for example s3://bucket/corpus.
        deadline_s: longest time for one file or range, all tries together.
    """

    def __init__(self, address: str, deadline_s: float) -> None:
        for problem in address_problems(address):
            raise DataError(problem)
        self.address, self.deadline_s = address.rstrip("/"), deadline_s
        try:
            import fsspec

            self._system, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise DataError(f"data.path = {address}: {error}; install the package that it names") from error

    def read(
        self, name: str, n_bytes: int | None = None, sha256: str = "", check: Callable[[bytes], object] | None = None
    ) -> bytes:
        """A whole file; of another size or content than expected it is read again, some times.

        Args:
            name: the file.
            n_bytes, sha256: its size and checksum, where they are known.
            check: raises DataError where the content cannot be right.

        Raises:
            StorageError: it is not there, or the deadline has passed.
        """
        return self._tried(name, lambda: self._system.cat_file(f"{self._root}/{name}"), n_bytes, sha256, check)

    def read_range(self, name: str, offset: int, n_bytes: int) -> bytes:
        """Bytes [offset, offset + n_bytes) of a file; Raises as `read`."""
        if n_bytes == 0:
            return b""
        path = f"{self._root}/{name}"
        return self._tried(name, lambda: self._system.cat_file(path, start=offset, end=offset + n_bytes), n_bytes)

    def size(self, name: str) -> int | None:
        """Bytes of a file as the storage says; None where it does not say.

        Raises:
            StorageError: as `read`.
        """
        info = retried(lambda: self._system.info(f"{self._root}/{name}"), f"{self.address}/{name}", self.deadline_s)
        return None if info.get("size") is None else int(info["size"])

    def open(self, name: str) -> IO[bytes]:
        """A file object that reads on demand, with the storage library's own retries."""
        return self._system.open(f"{self._root}/{name}", "rb")

    def find(self) -> dict[str, dict[str, Any]]:
        """What the storage says of every file below the address, by name; "" is the address itself."""

        def once() -> dict[str, dict[str, Any]]:
            found = self._system.find(self._root, detail=True)
            root = self._root.strip("/")
            return {name.strip("/").removeprefix(root).strip("/"): info for name, info in found.items()}

        return retried(once, self.address, self.deadline_s)

    def _tried(
        self,
        name: str,
        read: Callable[[], Any],
        n_bytes: int | None,
        sha256: str = "",
        check: Callable[[bytes], object] | None = None,
    ) -> bytes:
        def once() -> bytes:
            raw = bytes(read())
            if n_bytes is not None and len(raw) != n_bytes:
                raise OSError(f"gave {len(raw)} bytes instead of {n_bytes}")
            if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
                raise _ContentError("its content is not the manifest's (sha256)")
            if check is not None:
                try:
                    check(raw)
                except DataError as error:
                    raise _ContentError(str(error)) from error
            return raw

        return retried(once, f"{self.address}/{name}", self.deadline_s)


def retried(call: Callable[[], Value], what: str, deadline_s: float) -> Value:
    """The value of `call`, tried again with growing, jittered pauses until the deadline.

    A try that hangs is abandoned after a quarter of the deadline: not every storage library has timeouts of its own.

    Raises:
        StorageError: what is not there, or did not come in time; names the last failure.
    """
    started = time.monotonic()
    pause, tries, mismatches = _FIRST_WAIT_S, 0, 0
    while True:
        tries += 1
        left = deadline_s - (time.monotonic() - started)
        try:
            return _with_timeout(call, max(0.01, min(left, deadline_s * _TRY_SHARE)))
        except _ContentError as error:
            mismatches += 1
            if mismatches == _MISMATCHES:
                raise StorageError(f"{what}: {error}, {mismatches} times; copy the dataset there again") from error
            wait = pause
        except (FileNotFoundError, PermissionError) as error:
            raise MissingError(f"{what}: {error!r}; check the address and the rights to read it") from error
        except Exception as error:
            wait = pause * random.uniform(0.5, 1.5)  # ranks that failed together must not come back together
            if time.monotonic() - started + wait >= deadline_s:
                raise StorageError(
                    f"{what}: not read within data.deadline_s = {deadline_s:g} s ({tries} tries, the last one: "
                    f"{error!r}); check the storage, or raise data.deadline_s"
                ) from error
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST_WAIT_S)


def _with_timeout(call: Callable[[], Value], timeout_s: float) -> Value:
    """Runs `call` in a thread of its own that is left behind if it takes too long."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            answers.put((None, error))

    threading.Thread(target=work, daemon=True, name="trimtab-storage").start()
    try:
        value, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:.3g} s") from None
    if error is not None:
        raise error
    return value
