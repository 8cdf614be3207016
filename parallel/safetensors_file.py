"""The safetensors file format, written in one pass with its checksum and read by slices through a memory map.

The `safetensors` package reads these files, and this module reads those of the package. It exists because debug mode
runs with torch and numpy alone, because the checksum is taken while writing, and because a slice of a flat tensor can
be read without touching the rest. Format: an 8-byte little-endian header length, a JSON header, the raw data.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
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
    path: Path, tensors: Iterable[tuple[str, Tensor]], halfway: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Writes tensors to a new file and flushes it to the disk.

    Args:
        path: the file; must not exist.
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
    path: Path,
    listed: Sequence[Entry],
    halfway: Callable[[], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`write` for tensors that come in chunks, with the file's own `metadata` where given.

    Raises:
        OSError: as `write`. ValueError: two keys are equal, or chunks are not what their entry says.
    """
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
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in _chunks(header, listed):
            file.write(chunk)
            digest.update(chunk)
            if halfway is not None and 2 * file.tell() >= offset:
                file.flush()
                halfway()
                halfway = None
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


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


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafetensorsReader:
    """A memory-mapped file; nothing is read until a slice is asked for.

    Raises:
        ValueError: when the file is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{path} is not a safetensors file: its header would be longer than the file")
            try:
                self.entries: dict[str, Any] = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
        self.entries.pop("__metadata__", None)
        self.n_bytes = size - 8 - length  # of tensors
        self._data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if self.n_bytes else np.empty(0)

    def dtype(self, key: str) -> torch.dtype | None:
        """The dtype of a tensor; None for one that this module does not read."""
        return _DTYPES.get(self.entries[key]["dtype"])

    def flat_slice(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `key`, as a new 1-D tensor.

        Raises:
            KeyError: no such tensor.
        """
        entry = self.entries[key]
        dtype = _DTYPES[entry["dtype"]]
        width = torch.empty((), dtype=dtype).element_size()
        first = entry["data_offsets"][0]
        raw = np.array(self._data[first + start * width : first + stop * width], dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)
