"""A folder or file at an fsspec address, with the few methods of pathlib that checkpoints need, retries and a deadline.

Nothing here relies on renaming, which object stores do not have. A listing is asked for afresh each time: libraries
keep old ones. Errors are OSErrors, as those of a disk.
"""

import errno
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
READ_ONLY = frozenset(("http", "https"))
# Commands, caches, and file systems that lead to whatever address a file of theirs names.
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
_TRY_SHARE = 0.25  # of the deadline, for one try of a reading; a writing may take what is left
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)
_PIECE = 8 << 20  # bytes handed to a library at once

Value = TypeVar("Value")


class RemoteError(OSError):
    """The storage did not do what was asked within the deadline."""


def is_remote(path: object) -> bool:
    """Whether a text is an address of remote storage; file:// is a local path."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def address_problems(key: str, address: str) -> list[str]:
    """Why checkpoints cannot be kept at an address, a sentence each; nothing is opened."""
    if "::" in address or address.startswith("pipe:"):
        return [f"{key} = {address!r} is not a plain address; use one such as s3://bucket/folder, without :: or pipe:"]
    if "://" not in address:
        return []
    match = _SCHEME.match(address)
    if match is None or match[1] in REFUSED:
        return [f"{key} = {address!r}: this kind of address is not supported; use a folder, s3, gs or abfs"]
    if match[1] in READ_ONLY:
        return [f"{key} = {address!r}: {match[1]} cannot be written to; use a folder, s3, gs or abfs"]
    return []


@lru_cache(maxsize=16)
def _opened(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise RemoteError(f"{address}: remote checkpoints need the package fsspec; pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise RemoteError(f"{address}: {error}; install the package that it names") from error


class RemotePath:
    """An address below a root.

    Args:
        address: of the root, for example s3://bucket/runs/a.
        deadline_s: longest time for one reading or writing, all tries together.
        inside: the path below the root, "" for the root itself.
    """

    def __init__(self, address: str, deadline_s: float, inside: str = "") -> None:
        self.address, self.deadline_s, self.inside = address.rstrip("/"), deadline_s, inside

    def __str__(self) -> str:
        return f"{self.address}/{self.inside}" if self.inside else self.address

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "RemotePath":
        if name.startswith("/") or ".." in name.split("/") or "://" in name:
            raise ValueError(f"{name!r} leads out of {self}")
        return RemotePath(self.address, self.deadline_s, f"{self.inside}/{name}" if self.inside else name)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder that this lies in; below the root only."""
        return RemotePath(self.address, self.deadline_s, self.inside.rpartition("/")[0])

    def read_bytes(self) -> bytes:
        """The whole file. Raises: FileNotFoundError, RemoteError."""
        system, path = self._place()
        return bytes(self._tried(lambda: system.cat_file(path)))

    def read_text(self) -> str:
        """The whole file as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises: RemoteError, also where the file is shorter."""
        system, path = self._place()

        def once() -> bytes:
            raw = bytes(system.cat_file(path, start=start, end=stop))
            if len(raw) != stop - start:
                raise OSError(f"gave {len(raw)} bytes instead of {stop - start}")
            return raw

        return self._tried(once) if stop > start else b""

    def size(self) -> int | None:
        """Bytes of the file; None where there is none."""
        info = self._info()
        return int(info["size"]) if info is not None and info.get("type") != "directory" else None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return self.size() is not None

    def modified(self) -> float | None:
        """Seconds since 1970 by the storage's clock; None where it does not say."""
        info = self._info() or {}
        value = next((info[key] for key in ("LastModified", "mtime", "updated", "created") if key in info), None)
        if isinstance(value, datetime):
            return value.timestamp()
        return float(value) if isinstance(value, int | float) else None

    def files(self) -> dict[str, int]:
        """Bytes of every file below, by its path from here; empty where there is nothing.

        Raises:
            RemoteError: the storage does not answer: that is never an empty folder.
        """
        system, path = self._place()

        def once() -> dict[str, int]:
            system.invalidate_cache()
            try:
                found = system.find(path, detail=True)
            except FileNotFoundError:
                return {}
            root = path.strip("/")
            below = {name.strip("/").removeprefix(root).strip("/"): info for name, info in found.items()}
            return {name: int(info["size"] or 0) for name, info in below.items() if name}

        return self._tried(once)

    def write(self, pieces: Callable[[], Iterable[bytes | memoryview]]) -> int:
        """Writes a file from its beginning, and again if that fails; returns its size.

        Args:
            pieces: gives its content, the same at each call.

        Raises:
            RemoteError: not within the deadline, or the storage holds another number of bytes afterwards.
        """
        system, path = self._place()

        def once() -> int:
            written = 0
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(path, "wb") as file:
                for piece in pieces():
                    view = memoryview(piece).cast("B")
                    for start in range(0, len(view), _PIECE):
                        file.write(view[start : start + _PIECE])
                    written += len(view)
            system.invalidate_cache()
            stored = int(system.info(path)["size"])
            if stored != written:
                raise OSError(f"holds {stored} bytes instead of {written}")
            return written

        return self._tried(once, share=1.0)

    def write_bytes(self, content: bytes) -> int:
        """Writes a small file."""
        return self.write(lambda: [content])

    def unlink(self) -> None:
        """Deletes the file, if it is there."""
        system, path = self._place()

        def once() -> None:
            try:
                system.rm_file(path)
            except FileNotFoundError:
                return
            finally:
                system.invalidate_cache()

        self._tried(once)

    def remove_tree(self) -> None:
        """Deletes every file below."""
        for name in self.files():
            (self / name).unlink()

    def _place(self) -> tuple[Any, str]:
        system, root = _opened(self.address)
        return system, f"{root.rstrip('/')}/{self.inside}" if self.inside else root

    def _info(self) -> dict[str, Any] | None:
        system, path = self._place()

        def once() -> dict[str, Any] | None:
            system.invalidate_cache()
            try:
                return system.info(path)
            except FileNotFoundError:
                return None

        return self._tried(once)

    def _tried(self, call: Callable[[], Value], share: float = _TRY_SHARE) -> Value:
        """The value of `call`, tried again with growing, jittered pauses until the deadline; a try that hangs is left
        behind in its thread: not every library has timeouts of its own.
        """
        started, pause, tries = time.monotonic(), _FIRST_WAIT_S, 0
        while True:
            tries += 1
            left = self.deadline_s - (time.monotonic() - started)
            try:
                return _with_timeout(call, max(0.01, min(left, self.deadline_s * share)))
            except _FINAL as error:
                raise type(error)(f"{self}: {error!r}; check the address and the rights") from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                wait = pause * random.uniform(0.5, 1.5)  # ranks that failed together must not come back together
                if time.monotonic() - started + wait >= self.deadline_s:
                    raise RemoteError(
                        f"{self}: not done within {self.deadline_s:g} s ({tries} tries, the last one: {error!r}); "
                        "check the storage, or raise checkpoint.timeout_s"
                    ) from error
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_WAIT_S)


def _with_timeout(call: Callable[[], Value], timeout_s: float) -> Value:
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
