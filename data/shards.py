"""Tar shards: plain files that `webdataset` and `tar` read, written byte for byte reproducibly and read by offset."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.crc32c import crc32c
from data.errors import DataError
from data.index import RECORD, key_hash, write_index
from data.manifest import ShardInfo

TOKENS_SUFFIX = ".tok"
TEXT_SUFFIX = ".txt"
BLOCK = 512
_TAR_RECORD = 20 * BLOCK


class ShardWriter:
    """Writes the samples of one split into PREFIX-00000.tar, PREFIX-00001.tar, ... and an index beside each.

    A shard is closed as soon as it has reached `shard_bytes`; it therefore exceeds it by at most one sample.
    """

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self._folder, self._prefix, self._shard_bytes = folder, prefix, shard_bytes
        self._shards: list[ShardInfo] = []
        self._file: BinaryIO | None = None
        self._open_name = ""
        self._position = 0
        self._sha256 = hashlib.sha256()
        self._records: list[tuple[int, int, int, int, int]] = []

    def add(self, key: str, tokens: np.ndarray, text: bytes | None = None) -> None:
        """Adds one sample.

        Args:
            key: unique in the dataset, without a dot or a slash.
            tokens: (n,) of the dataset's dtype, the end-of-document token last.
            text: the raw document, stored as a second member KEY.txt.
        """
        if self._file is None:
            self._open_name = f"{self._prefix}-{len(self._shards):05d}.tar"
            self._file = (self._folder / self._open_name).open("wb")
            self._position, self._sha256, self._records = 0, hashlib.sha256(), []
        payload = tokens.tobytes()
        offset = self._member(key + TOKENS_SUFFIX, payload)
        if text is not None:
            self._member(key + TEXT_SUFFIX, text)
        self._records.append((key_hash(key), offset, len(payload), len(tokens), crc32c(payload)))
        if self._position >= self._shard_bytes:
            self._finish()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, plain JSON values; everything so far is on the disk."""
        if self._file is None:
            return {"shards": [asdict(shard) for shard in self._shards], "open": None}
        self._file.flush()
        os.fsync(self._file.fileno())
        unfinished = {"name": self._open_name, "position": self._position, "records": self._records}
        return {"shards": [asdict(shard) for shard in self._shards], "open": unfinished}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; what was written after that is cut off.

        Raises:
            DataError: the unfinished shard is shorter than it was.
        """
        self._shards = [ShardInfo(**shard) for shard in state["shards"]]
        unfinished = state["open"]
        if unfinished is None:
            return
        self._open_name, self._position = unfinished["name"], unfinished["position"]
        self._records = [tuple(record) for record in unfinished["records"]]
        path = self._folder / self._open_name
        if path.stat().st_size < self._position:
            raise DataError(f"{path}: is shorter than it was when packing was interrupted; remove it and pack again")
        self._file = path.open("r+b")
        self._file.truncate(self._position)
        self._sha256 = hashlib.sha256()
        while chunk := self._file.read(1 << 20):
            self._sha256.update(chunk)

    def close(self) -> tuple[ShardInfo, ...]:
        """Finishes the last shard and returns what was written."""
        self._finish()
        return tuple(self._shards)

    def abort(self) -> None:
        """Closes the open file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _member(self, name: str, payload: bytes) -> int:
        """Writes one tar member and returns the offset of its payload."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(payload), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(payload)
        self._write(b"\0" * (-len(payload) % BLOCK))
        return offset

    def _write(self, raw: bytes) -> None:
        assert self._file is not None
        self._file.write(raw)
        self._sha256.update(raw)
        self._position += len(raw)

    def _finish(self) -> None:
        if self._file is None:
            return
        self._write(b"\0" * (2 * BLOCK))
        self._write(b"\0" * (-self._position % _TAR_RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        records = np.array(self._records, dtype=RECORD)
        index_name = self._open_name.removesuffix(".tar") + ".idx"
        index_crc = write_index(self._folder / index_name, records, self._position, self._sha256.hexdigest())
        self._shards.append(
            ShardInfo(
                file=self._open_name,
                n_bytes=self._position,
                sha256=self._sha256.hexdigest(),
                index=index_name,
                index_crc32c=index_crc,
                n_documents=len(records),
                n_tokens=int(records["n_tokens"].sum()),
            )
        )


class ShardReader:
    """Reads byte ranges of a folder's shards; file handles stay open, at most `max_open` of them. Thread-safe."""

    remote = False

    def __init__(self, folder: Path, files: Sequence[str], max_open: int = 256) -> None:
        self._folder, self._files, self._max_open = folder, tuple(files), max_open
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """Bytes [offset, offset + nbytes) of a shard; fewer where the file ends before.

        Raises:
            DataError: the shard cannot be opened or read.
        """
        with self._lock:
            try:
                handle = self._handles.pop(shard, None)
                if handle is None:
                    if len(self._handles) >= self._max_open:
                        os.close(self._handles.pop(next(iter(self._handles))))
                    handle = os.open(self._folder / self._files[shard], os.O_RDONLY)
                self._handles[shard] = handle  # last in, last closed
                raw = os.pread(handle, nbytes, offset)
                while len(raw) < nbytes and (more := os.pread(handle, nbytes - len(raw), offset + len(raw))):
                    raw += more
                return raw
            except OSError as error:
                raise DataError(
                    f"{self._folder / self._files[shard]}: cannot be read at byte {offset} ({error.strerror}); restore "
                    f"the shard or pack the dataset again"
                ) from error

    def prefetch(self, shards: Iterable[int]) -> None:
        """Nothing: the files are here."""

    def close(self) -> None:
        """Closes all files; a later read opens them again."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()
