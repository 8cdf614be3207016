"""The safetensors file format, written in one pass with its checksum and read by slices through a memory map.

The `safetensors` package reads these files, and this module reads those of the package. It exists because debug mode
runs with torch and numpy alone, because the checksum is taken while writing, and because a slice of a flat tensor can
be read without touching the rest. Format: an 8-byte little-endian header length, a JSON header, the raw data.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.remote import RemotePath
from parallel.roots import Root

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_BLOCK, _BLOCKS_KEPT = 4 << 20, 16  # of a remote file: bytes of one, and how many a reader keeps
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Entry(NamedTuple):
    """A tensor to be written, whose values need not be in memory all at once.

    chunks: gives its values in order, in tensors of any shape.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Root, tensors: Iterable[tuple[str, Tensor]], halfway: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Writes tensors to a new file and flushes it to the disk; at an address, until the storage has it.

    Args:
        path: the file; must not exist in a folder.
        tensors: (key, tensor) pairs; keys must differ.
        halfway: called once, when half of the data has been handed to the operating system.

    Returns:
        {"size": bytes, "sha256": hex digest of the whole file}.

    Raises:
        OSError: the disk is full, the path exists, or cannot be written.
    """
    entries = [Entry(key, one.dtype, tuple(one.shape), partial(iter, [one])) for key, one in tensors]
    return write_entries(path, entries, halfway)


def write_entries(
    path: Root,
    listed: Sequence[Entry],
    halfway: Callable[[], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`write` for tensors that come in chunks, with the file's own `metadata` where given.

    At an address the chunks may be asked for again, when an attempt has failed.

    Raises:
        OSError: as `write`. ValueError: two keys are equal, or chunks are not what their entry says.
    """
    header, data_bytes = _header(path, listed, metadata)
    if isinstance(path, RemotePath):
        return _write_remote(path, header, data_bytes, listed, halfway)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in _chunks(header, listed):
            file.write(chunk)
            digest.update(chunk)
            if halfway is not None and 2 * file.tell() >= data_bytes:
                file.flush()
                halfway()
                halfway = None
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def _header(path: Root, listed: Sequence[Entry], metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    """The header, and the bytes of all data."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in listed:
        if entry.key in entries:
            raise ValueError(f"two tensors are called {entry.key!r} in {path.name}")
        entries[entry.key] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.n_bytes],
        }
        offset += entry.n_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return header, offset


def _write_remote(
    path: RemotePath,
    header: bytes,
    data_bytes: int,
    listed: Sequence[Entry],
    halfway: Callable[[], None] | None,
) -> dict[str, Any]:
    digests: list[Any] = []
    left = [halfway] if halfway is not None else []

    def pieces() -> Iterator[bytes | memoryview]:
        digest, written = hashlib.sha256(), 0
        for chunk in _chunks(header, listed):
            yield chunk
            digest.update(chunk)
            written += len(chunk)
            if left and 2 * written >= data_bytes:
                left.pop()()
        digests.append(digest)

    return {"size": path.write(pieces), "sha256": digests[-1].hexdigest()}


def _chunks(header: bytes, listed: Sequence[Entry]) -> Iterable[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry in listed:
        written = 0
        for tensor in entry.chunks():
            flat = tensor.detach().cpu().contiguous().view(-1)
            if flat.dtype != entry.dtype:
                raise ValueError(f"{entry.key} is {entry.dtype}, and was given {flat.dtype}")
            written += flat.numel() * flat.element_size()
            if flat.numel():
                yield flat.view(torch.uint8).numpy().data
        if written != entry.n_bytes:
            raise ValueError(f"{entry.key} has {entry.n_bytes} bytes, and was given {written}")


def file_size(path: Root) -> int | None:
    """Bytes of a file; None where there is none. Raises: OSError."""
    if isinstance(path, RemotePath):
        return path.size()
    return path.stat().st_size if path.is_file() else None


def sha256(path: Root) -> str:
    """Hex digest of a file's bytes. Raises: OSError."""
    if isinstance(path, RemotePath):
        digest, size = hashlib.sha256(), path.size() or 0
        for start in range(0, size, _BLOCK):
            digest.update(path.read_range(start, min(start + _BLOCK, size)))
        return digest.hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Blocks:
    """Ranges of a remote file, read in blocks of which the last used are kept: neighbouring slices are one request."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size = path, size
        self._kept: dict[int, bytes] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), (stop - start,) uint8."""
        parts = []
        for number in range(start // _BLOCK, -(-stop // _BLOCK)):
            first = number * _BLOCK
            parts.append(self._block(number)[max(0, start - first) : stop - first])
        return np.frombuffer(b"".join(parts), dtype=np.uint8).copy()

    def _block(self, number: int) -> bytes:
        block = self._kept.pop(number, None)
        if block is None:
            first = number * _BLOCK
            block = self._path.read_range(first, min(first + _BLOCK, self._size))
        self._kept[number] = block  # last in, last out
        while len(self._kept) > _BLOCKS_KEPT:
            self._kept.pop(next(iter(self._kept)))
        return block


class _Mapped:
    """Ranges of a local file through a memory map."""

    def __init__(self, path: Path, size: int) -> None:
        self._data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop), (stop - start,) uint8."""
        return np.array(self._data[start:stop], dtype=np.uint8)


class SafetensorsReader:
    """A file that is memory-mapped, or read by ranges at an address; its data not until a slice is asked for.

    Raises:
        ValueError: when the file is not a safetensors file. OSError: it cannot be read.
    """

    def __init__(self, path: Root) -> None:
        self.path = path
        size = file_size(path)
        if size is None:
            raise FileNotFoundError(f"{path} is missing")
        self._bytes: _Blocks | _Mapped = _Blocks(path, size) if isinstance(path, RemotePath) else _Mapped(path, size)
        length = int.from_bytes(self._bytes.read(0, min(8, size)).tobytes(), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is not a safetensors file: its header would be longer than the file")
        try:
            self.entries: dict[str, Any] = json.loads(self._bytes.read(8, 8 + length).tobytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
        self.entries.pop("__metadata__", None)
        self._first = 8 + length
        self.n_bytes = size - 8 - length  # of tensors

    def dtype(self, key: str) -> torch.dtype | None:
        """The dtype of a tensor; None for one that this module does not read."""
        return _DTYPES.get(self.entries[key]["dtype"])

    def flat_slice(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `key`, as a new 1-D tensor.

        Raises:
            KeyError: no such tensor. ValueError: its dtype is not read here. OSError: it cannot be read.
        """
        entry = self.entries[key]
        dtype = self.dtype(key)
        if dtype is None:
            raise ValueError(
                f"{self.path}: {key} is {entry['dtype']}, which is not read here; write it as one of "
                f"{', '.join(_DTYPES)}"
            )
        width = torch.empty((), dtype=dtype).element_size()
        first = self._first + entry["data_offsets"][0]
        raw = self._bytes.read(first + start * width, first + stop * width)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)
