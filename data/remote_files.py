"""Files of a source at an fsspec address, with the few methods of pathlib that reading documents needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from data.errors import DataError
from data.storage import Storage

_DEADLINE_S = 300.0


class FileStatus(NamedTuple):
    """Size (-1 where the storage does not say it), and a number that changes when the file does, which is made from
    what the storage says of it and is no time."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class RemoteFile:
    """One remote file: its storage's folder and its name in it (which may hold slashes)."""

    storage: Storage
    name: str
    info: str
    n_bytes: int | None

    def __str__(self) -> str:
        return f"{self.storage.address}/{self.name}"

    def read_bytes(self) -> bytes:
        """The whole content, with retries.

        Raises:
            StorageError: it did not come in time.
        """
        return self.storage.read(self.name, self.n_bytes)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A file object that reads on demand.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            return self.storage.open(self.name)
        except Exception as error:
            raise DataError(f"{self}: cannot be opened ({error!r}); check the address and the rights") from error

    def stat(self) -> FileStatus:
        """Size and a fingerprint of what the storage says of the file."""
        digest = hashlib.blake2b(self.info.encode("utf-8"), digest_size=8).digest()
        return FileStatus(-1 if self.n_bytes is None else self.n_bytes, int.from_bytes(digest, "little"))


def list_files(address: str) -> list[tuple[str, RemoteFile]]:
    """The file at an address, under the name "", or all files below it by sorted name, hidden ones among them.

    Raises:
        DataError: the address is refused, nothing is there, or the storage does not answer.
    """
    folder, _, last = address.rstrip("/").rpartition("/")
    whole = Storage(address, _DEADLINE_S)
    found: dict[str, dict[str, Any]] = whole.find()
    if not found:
        raise DataError(f"source {address!r}: no file is there; check the address")
    if list(found) == [""]:  # the address is a file itself
        storage = Storage(folder, _DEADLINE_S)
        return [("", _file(storage, last, found[""]))]
    return [(name, _file(whole, name, found[name])) for name in sorted(found) if name]


def _file(storage: Storage, name: str, info: dict[str, Any]) -> RemoteFile:
    told = {
        key: str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created", "md5Hash") if key in info
    }
    return RemoteFile(storage, name, str(sorted(told.items())), None if info.get("size") is None else int(info["size"]))
