"""Corpora: sources (built-in names, folders, text, JSONL and Parquet files) read as documents in a fixed order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.builtin import BUILTIN_CORPORA, BuiltinCorpus
from data.errors import DataError
from data.remote_files import RemoteFile, list_files
from data.storage import is_remote, local_path

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING", "COPYING.txt")


@dataclass(frozen=True)
class Document:
    """One text: its name (unique within a packing), its UTF-8 bytes, its source's name and its licence."""

    name: str
    data: bytes
    origin: str
    licence: str

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")


@dataclass
class Source:
    """A source of documents; `read` may be called again and gives the same documents in the same order.

    Attributes:
        name: short name that goes into the manifest and in front of document names when there are several sources.
        licence: what documents without their own licence carry.
        files: (name, path) of every file, in reading order.
        kind: "folder", "text", "jsonl" or "parquet".
        skipped: what the last complete `read` left out, by reason.
    """

    name: str
    licence: str
    files: Sequence[tuple[str, Path | RemoteFile]]
    kind: str
    skipped: Counter[str] = field(default_factory=Counter)

    def read(self) -> Iterator[Document]:
        """Yields the documents; counts in `skipped` what is empty or not UTF-8 text."""
        self.skipped = Counter()
        for name, path in self.files:
            kind = _kind(name) if self.kind == "folder" and isinstance(path, RemoteFile) else self.kind
            if kind == "jsonl":
                yield from self._read_jsonl(name, path)
            elif kind == "parquet":
                yield from self._read_parquet(name, path)
            else:
                yield from self._make(name, _read_bytes(path), self.licence)

    def signature(self) -> list[tuple[str, int, int]]:
        """(name, bytes, modification time in ns) of every file: cheap evidence that nothing changed."""
        found = []
        for name, path in self.files:
            status = path.stat()
            found.append((f"{self.name}/{name}", status.st_size, status.st_mtime_ns))
        return found

    def _make(self, name: str, data: bytes, licence: str) -> Iterator[Document]:
        if not data:
            self.skipped["empty"] += 1
        elif not _is_text(data):
            self.skipped["not UTF-8 text"] += 1
        else:
            yield Document(name, data, self.name, licence)

    def _read_jsonl(self, name: str, path: Path | RemoteFile) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    text = row["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f'{path}, line {number}: is not a JSON object with a field "text" ({error}); '
                        f'write one object a line, for example {{"text": "..."}}'
                    ) from error
                yield from self._make_row(f"{name}:{number}", text, row)

    def _read_parquet(self, name: str, path: Path | RemoteFile) -> Iterator[Document]:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{path}: reading Parquet needs the package pyarrow; pip install pyarrow") from error
        try:
            table = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open())
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: is not a readable Parquet file ({error})") from error
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise DataError(f"{path}: has the columns {', '.join(columns)}; a column named text is needed")
        wanted = [column for column in columns if column in ("text", "license", "licence")]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield from self._make_row(f"{name}:{number}", row["text"], row)

    def _make_row(self, name: str, text: object, row: dict) -> Iterator[Document]:
        if not isinstance(text, str):
            self.skipped["field text is not a string"] += 1
            return
        licence = row.get("license") or row.get("licence") or self.licence
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, legal in JSON
            self.skipped["not UTF-8 text"] += 1
            return
        yield from self._make(name, data, str(licence))


def open_source(spec: str, licence: str | None = None) -> Source:
    """Finds out what a source is and lists its files in a fixed order.

    Args:
        spec: a built-in corpus's name, a folder, a file, or an fsspec address of a folder or file (s3://bucket/texts).
            A name that is both is taken as the built-in corpus; write ./NAME for the folder.
        licence: SPDX name of the licence, where the source does not say it itself.

    Raises:
        DataError: nothing is there, or nothing in it can be read.
    """
    if spec in BUILTIN_CORPORA:
        corpus = BUILTIN_CORPORA[spec]
        return Source(corpus.origin(), corpus.licence, _builtin_files(corpus), "folder")
    if is_remote(spec):
        remote = list_files(spec)
        kind = _kind(remote[0][0]) if len(remote) == 1 else "folder"
        return Source(spec.rstrip("/").rpartition("/")[2], licence or "unknown", remote, kind)
    path = local_path(spec).expanduser()
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise DataError(f"{path}: the folder holds no files; give a folder with text or code")
        return Source(path.resolve().name, licence or _find_licence(path), files, "folder")
    if not path.is_file():
        raise DataError(
            f"source {spec!r} is neither a built-in corpus ({', '.join(sorted(BUILTIN_CORPORA))}) nor an existing "
            f"folder or file"
        )
    return Source(path.name, licence or "unknown", [(path.name, path)], _kind(path.name))


def _kind(name: str) -> str:
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(name).suffix.lower(), "text")


def _builtin_files(corpus: BuiltinCorpus) -> list[tuple[str, Path]]:
    files = corpus.files()
    if not files:
        raise DataError(
            f"built-in corpus {corpus.name}: no source files under {corpus.root()}; this Python is installed without "
            f"its source, give a folder of text or code instead"
        )
    return files


def _walk(root: Path) -> list[tuple[str, Path]]:
    """Regular files below a folder by sorted relative name; hidden names, links to folders and caches left out."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__pycache__")
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _find_licence(root: Path) -> str:
    for name in _LICENCE_FILES:
        if (root / name).is_file():
            return f"see {name}"
    return "unknown"


def _read_bytes(path: Path | RemoteFile) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); fix its access or leave it out") from error


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
