"""Where verification reads a dataset: a folder, or an address of which one file after the other is copied here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from data.errors import DataError
from data.manifest import MANIFEST, PACK_RECORD, Manifest, noted_fingerprint, parse_manifest, read_manifest
from data.storage import MissingError, Storage

_CHUNK = 8 << 20
_ARRIVALS = 2  # of a file whose checksum is wrong: damage in the storage is the same both times, or may be
_LISTING_S = 10.0  # a server without listings answers with errors that would be tried again until the deadline


class Place(Protocol):
    """A dataset's files, by name, as files of `folder`."""

    folder: Path

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            DataError: it is not there or damaged.
        """
        ...

    def bring(self, name: str, sha256: str = "", progress: Callable[[int], None] | None = None) -> None:
        """Sees to it that a file is in `folder`, if it exists; `progress` hears of the bytes of every
        part that is copied.

        Args:
            sha256: its checksum where it is known.
        """
        ...

    def done(self, name: str) -> None:
        """The file is not needed any more."""
        ...

    def names(self) -> list[str]:
        """All files, sorted; empty where that cannot be told."""
        ...


class FolderPlace:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> Manifest:
        """As Place.manifest."""
        return read_manifest(self.folder)

    def bring(self, name: str, sha256: str = "", progress: Callable[[int], None] | None = None) -> None:
        """It is there."""

    def done(self, name: str) -> None:
        """It stays."""

    def names(self) -> list[str]:
        """As Place.names."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []


class AddressPlace:
    """An address of remote storage; its files come into a temporary folder, every byte through `Storage`.

    Args:
        address: of the dataset's folder.
        deadline_s: longest time for one part of a file, all tries together.
        scratch: an empty folder for one shard at a time and the small files.
    """

    def __init__(self, address: str, deadline_s: float, scratch: Path) -> None:
        self._storage, self.folder = Storage(address, deadline_s), scratch

    def manifest(self) -> Manifest:
        """As Place.manifest."""
        recorded = ""
        with suppress(MissingError):
            recorded = noted_fingerprint(self._storage.read(PACK_RECORD))
        return parse_manifest(self._storage.read(MANIFEST), f"{self._storage.address}/{MANIFEST}", recorded)

    def bring(self, name: str, sha256: str = "", progress: Callable[[int], None] | None = None) -> None:
        """Copies a file; one whose checksum is wrong is copied again, to tell a transfer's damage from the storage's.

        Raises:
            StorageError: the storage does not answer within the deadline.
        """
        try:
            for arrival in range(_ARRIVALS):
                if self._copy(name, progress if arrival == 0 else None) == sha256 or not sha256:
                    return
        except MissingError:
            self.done(name)

    def done(self, name: str) -> None:
        """Removes the copy."""
        (self.folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """As Place.names; a storage that cannot be listed gives none."""
        try:
            found = Storage(self._storage.address, min(_LISTING_S, self._storage.deadline_s)).find()
        except DataError:
            return []
        return sorted(name for name in found if name and "/" not in name)

    def _copy(self, name: str, progress: Callable[[int], None] | None) -> str:
        """Copies a file in parts; returns its sha256."""
        size = self._storage.size(name)
        digest = hashlib.sha256()
        with (self.folder / name).open("wb") as file:
            for at in range(0, 1 if size is None else size, _CHUNK):
                if size is None:
                    raw = self._storage.read(name)
                else:
                    raw = self._storage.read_range(name, at, min(_CHUNK, size - at))
                file.write(raw)
                digest.update(raw)
                if progress:
                    progress(len(raw))
        return digest.hexdigest()


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A folder that is removed with its content when it is left."""
    return tempfile.TemporaryDirectory(prefix="trimtab-verify-")
