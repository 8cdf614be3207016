"""The binary index beside each shard: where every sample lies, how long it is, and its checksum.

Layout, little-endian: a header of 80 bytes (magic, version, record size, number of records, shard bytes, CRC-32C of the
records, shard sha256, CRC-32C of the header before it) and then one record of 36 bytes per sample, in shard order.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.crc32c import crc32c
from data.errors import DataError

RECORD = np.dtype([("key_hash", "<u8"), ("offset", "<u8"), ("nbytes", "<u8"), ("n_tokens", "<u8"), ("crc32c", "<u4")])
RECORD_LAYOUT = struct.Struct("<QQQQI")  # the same; unpacks one record several times faster than numpy picks it out
_MAGIC = b"TRIMIDX\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQI32s")
_HEADER_BYTES = _HEADER.size + 4


@dataclass(frozen=True)
class IndexHeader:
    """What an index says of its shard: samples, shard bytes, shard sha256 (hex), CRC-32C of the records."""

    n_records: int
    shard_bytes: int
    shard_sha256: str
    records_crc: int


def key_hash(key: str) -> int:
    """64-bit hash of a sample's key."""
    return int.from_bytes(blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")


def write_index(path: Path, records: np.ndarray, shard_bytes: int, shard_sha256: str) -> int:
    """Writes an index file and returns the CRC-32C of its records.

    Args:
        path: the file.
        records: (n,) of dtype RECORD.
        shard_bytes, shard_sha256: size and hex checksum of the finished shard.
    """
    body = np.ascontiguousarray(records, dtype=RECORD).tobytes()
    records_crc = crc32c(body)
    header = _HEADER.pack(
        _MAGIC, _VERSION, RECORD.itemsize, len(records), shard_bytes, records_crc, bytes.fromhex(shard_sha256)
    )
    path.write_bytes(header + struct.pack("<I", crc32c(header)) + body)
    return records_crc


def read_header(path: Path) -> IndexHeader:
    """Reads and checks an index file's header and size.

    Raises:
        DataError: missing, not an index, of another version, damaged or cut.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER_BYTES)
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: the index is missing ({error.strerror}); {_REMEDY}") from error
    return parse_header(raw, size, str(path))


def parse_header(raw: bytes, size: int, path: str) -> IndexHeader:
    """The header at the beginning of an index file of `size` bytes; Raises as `read_header`, with `path`."""
    if len(raw) < _HEADER_BYTES or raw[:8] != _MAGIC:
        raise DataError(f"{path}: is not an index file; {_REMEDY}")
    header, (stored_crc,) = raw[: _HEADER.size], struct.unpack("<I", raw[_HEADER.size : _HEADER_BYTES])
    if crc32c(header) != stored_crc:
        raise DataError(f"{path}: the index's header is damaged; {_REMEDY}")
    _, version, record_bytes, n_records, shard_bytes, records_crc, sha256 = _HEADER.unpack(header)
    if version != _VERSION or record_bytes != RECORD.itemsize:
        raise DataError(f"{path}: index version {version} is not {_VERSION}; {_REMEDY}")
    expected = _HEADER_BYTES + n_records * RECORD.itemsize
    if size != expected:
        raise DataError(f"{path}: has {size} bytes, {n_records} records need {expected}; {_REMEDY}")
    return IndexHeader(n_records, shard_bytes, sha256.hex(), records_crc)


def map_records(path: Path, header: IndexHeader, *, check: bool = True) -> np.ndarray:
    """Memory-maps the records, (n,) of dtype RECORD, read-only.

    Raises:
        DataError: their checksum is not the header's (only where `check`).
    """
    if header.n_records == 0:
        return np.empty(0, RECORD)
    # several times faster than np.memmap, both to make and to pick a record out of
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    records = np.frombuffer(mapped, RECORD, header.n_records, _HEADER_BYTES)
    if check and crc32c(records.view(np.uint8)) != header.records_crc:
        raise DataError(f"{path}: the index's records are damaged; {_REMEDY}")
    return records


def records_at(raw: bytes) -> bytes:
    """The records' bytes of a whole index file."""
    return raw[_HEADER_BYTES:]


_REMEDY = "restore it from a copy or pack the dataset again"
