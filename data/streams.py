"""A source's file as a stream of its content, decompressed where it is compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.errors import DataError
from data.filekind import HEAD, compression_of
from data.folder import readable
from data.remote_files import RemoteFile

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Content:
    """A file's content: what reads it, its first bytes, and the compression that was taken off ("" for none)."""

    stream: io.BufferedReader
    head: bytes
    compression: str


def place_of(file: Path | RemoteFile) -> str:
    """A file's path or address, for messages."""
    return readable(file) if isinstance(file, Path) else str(file)


@contextmanager
def opened(file: Path | RemoteFile, at_once: bool) -> Iterator[Content]:
    """Opens a file, and takes its compression off, which its first bytes tell.

    Args:
        file: the file.
        at_once: fetch a remote file whole, with the retries that this has, since all of it is needed at once.

    Raises:
        DataError: it cannot be opened or read, or its compression needs a package.
    """
    with reading(file):
        if isinstance(file, Path):
            raw: IO[bytes] = file.open("rb", buffering=_BUFFER)
        else:
            raw = io.BytesIO(file.read_bytes()) if at_once else file.open()
    with raw:
        with reading(file):
            stream = _buffered(raw)
            compression = compression_of(_head(stream))
            if compression:
                stream = _buffered(_decompressed(stream, compression, file))
            head = _head(stream)
        yield Content(stream, head, compression)


@contextmanager
def reading(file: Path | RemoteFile, where: str = "") -> Iterator[None]:
    """Turns what goes wrong while a file is read into one sentence that names it.

    Raises:
        DataError: it cannot be read, or its compression is damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{place_of(file)}{where}: its compression is damaged or cut off ({error}); fetch the file again"
        ) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(
            f"{place_of(file)}{where}: cannot be read ({why}); fix its access, fetch it again or leave it out"
        ) from error
    except Exception as error:
        if isinstance(file, Path) or isinstance(error, DataError):
            raise
        # storage libraries have exceptions of their own, which fsspec does not always turn into an OSError
        raise DataError(f"{place_of(file)}{where}: cannot be read ({error!r}); try again later") from error


def _buffered(raw: Any) -> io.BufferedReader:
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _BUFFER)


def _head(stream: io.BufferedReader) -> bytes:
    return stream.peek(HEAD)[:HEAD]


def _decompressed(stream: io.BufferedReader, compression: str, file: Path | RemoteFile) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if compression == "bzip2":
        return bz2.BZ2File(stream)
    if compression == "xz":
        return lzma.LZMAFile(stream)
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{place_of(file)}: reading zstd needs the package pyarrow; pip install pyarrow") from error
    return pyarrow.input_stream(stream, compression="zstd")
