"""Corpora: sources (built-in names, folders, files of text or rows, addresses) read as documents in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.builtin import BUILTIN_CORPORA, BuiltinCorpus
from data.errors import DataError
from data.filekind import container_of, holds_rows, is_about, is_media, kind_of, named_container
from data.folder import choose, readable, walk
from data.leftout import (
    ABOUT,
    BINARY,
    BOM_REMOVED,
    EMPTY,
    MEDIA,
    NO_FIELD,
    NOT_A_STRING,
    NOT_READ,
    NOT_UTF8,
    NULL,
    POINTER,
    UTF16,
    Account,
    LeftOut,
)
from data.remote_files import RemoteFile, list_files
from data.rows import NotRowsError, Row, json_rows, jsonl_rows, parquet_rows
from data.storage import is_remote, local_path
from data.streams import Content, opened, reading

TEXT_FIELD = "text"
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING", "COPYING.txt")
_POINTER = b"version https://git-lfs.github.com/spec/"
_BOM, _UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


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
        text_field: where rows of JSON and Parquet have their text.
        folder: whether it is a folder, in which notes beside data are left out.
        not_taken: what was not listed in `files`, by reason.
        left: what the last complete `read` left out of `files`, by reason.
        changed: what it changed.
        followed: the links to folders that were followed.
    """

    name: str
    licence: str
    files: Sequence[tuple[str, Path | RemoteFile]]
    text_field: str = TEXT_FIELD
    folder: bool = True
    not_taken: LeftOut = field(default_factory=LeftOut)
    followed: LeftOut = field(default_factory=LeftOut)
    left: LeftOut = field(default_factory=LeftOut)
    changed: LeftOut = field(default_factory=LeftOut)
    _taken: tuple[int, int, bool] = (0, 0, True)  # documents, bytes, whether all are notes on data
    _about: frozenset[str] | None = None

    def read(self) -> Iterator[Document]:
        """Yields the documents; notes in `left` and `changed` what is left out and changed.

        Raises:
            DataError: a file cannot be read or is damaged, or a row has no text's field.
        """
        self.left, self.changed = LeftOut(), LeftOut()
        if self._about is None:
            self._about = _notes_beside_data(self.files, self.text_field) if self.folder else frozenset()
        n_documents = n_bytes = 0
        only_about = True
        for name, file in self.files:
            if name in self._about:
                self.left.add(ABOUT, name, max(0, file.stat().st_size))
                continue
            about = is_about(name)
            for document in self._read(name, file):
                n_documents += 1
                n_bytes += len(document.data)
                only_about = only_about and about
                yield document
        self._taken = (n_documents, n_bytes, only_about)

    def signature(self) -> list[tuple[str, int, int]]:
        """(name, bytes, modification time in ns) of every file: cheap evidence that nothing changed."""
        found = []
        for name, file in self.files:
            with reading(file):
                status = file.stat()
            found.append((f"{self.name}/{name}", status.st_size, status.st_mtime_ns))
        return found

    def account(self) -> Account:
        """What became of the source in the last complete `read`."""
        left = LeftOut()
        left.reasons = {**self.not_taken.reasons, **self.left.reasons}
        changed = LeftOut()
        changed.reasons = {**self.followed.reasons, **self.changed.reasons}
        n_documents, n_bytes, only_about = self._taken
        return Account(self.name, n_documents, n_bytes, left, changed, self.folder and only_about)

    def _read(self, name: str, file: Path | RemoteFile) -> Iterator[Document]:
        kind = kind_of(name)
        with opened(file, at_once=kind == "text" and not named_container(name)) as content:
            head = content.head
            if kind != "parquet" and head.startswith(b"PAR1"):
                kind = "parquet"
            if head.startswith(_POINTER):
                self.left.add(POINTER, name, max(0, file.stat().st_size))
            elif kind == "parquet":
                yield from self._rows(name, parquet_rows(content, file, self.text_field))
            elif not head:
                self.left.add(EMPTY, name)
            elif container := container_of(name, head):
                self.left.add(NOT_READ.format(container), name, max(0, file.stat().st_size))
            elif head.startswith(_UTF16_BOMS):
                self.left.add(UTF16, name, max(0, file.stat().st_size))
            elif kind == "jsonl":
                yield from self._rows(name, jsonl_rows(content, file, self.text_field))
            elif kind == "json":
                yield from self._read_json(name, file, content)
            elif b"\0" in head:
                self._leave_binary(name, max(0, file.stat().st_size))
            else:
                with reading(file):
                    data = content.stream.read()
                yield from self._text(name, data)

    def _read_json(self, name: str, file: Path | RemoteFile, content: Content) -> Iterator[Document]:
        try:
            yield from self._rows(name, json_rows(content, file, self.text_field))
        except NotRowsError as one:
            if one.rows:
                self.left.add(NO_FIELD.format(self.text_field), name, len(one.content))
            else:
                yield from self._text(name, one.content)

    def _text(self, name: str, data: bytes) -> Iterator[Document]:
        """A file that is one document."""
        if data.startswith(_BOM):
            data = data[len(_BOM) :]
            self.changed.add(BOM_REMOVED, name, len(_BOM))
        if b"\0" in data:
            self._leave_binary(name, len(data))
        elif is_media(name) and not _is_utf8(data):
            self.left.add(MEDIA, name, len(data))
        else:
            yield from self._make(name, data, self.licence)

    def _leave_binary(self, name: str, n_bytes: int) -> None:
        self.left.add(MEDIA if is_media(name) else BINARY, name, n_bytes)

    def _rows(self, name: str, rows: Iterator[Row]) -> Iterator[Document]:
        for row in rows:
            place = f"{name}:{row.number}"
            if isinstance(row.text, str):
                try:
                    data = row.text.encode("utf-8")
                except UnicodeEncodeError:  # a lone surrogate, legal in JSON
                    self.left.add(NOT_UTF8, place, row.n_bytes)
                    continue
            elif isinstance(row.text, bytes):
                data = row.text
            elif row.text is None:
                self.left.add(NULL.format(self.text_field), place)
                continue
            else:
                self.left.add(NOT_A_STRING.format(self.text_field), place, row.n_bytes)
                continue
            licence = str(row.licence or self.licence)
            if b"\0" in data:
                self.left.add(BINARY, place, len(data))
            elif data and isinstance(row.text, str):  # known to be UTF-8
                yield Document(place, data, self.name, licence)
            else:
                yield from self._make(place, data, licence)

    def _make(self, name: str, data: bytes, licence: str) -> Iterator[Document]:
        if not data:
            self.left.add(EMPTY, name)
        elif not _is_utf8(data):
            self.left.add(NOT_UTF8, name, len(data))
        else:
            yield Document(name, data, self.name, licence)


def open_source(spec: str, licence: str | None = None, field: str = TEXT_FIELD) -> Source:
    """Finds out what a source is and lists its files in a fixed order.

    Args:
        spec: a built-in corpus's name, a folder, a file, or an fsspec address of a folder or file (s3://bucket/texts).
            A name that is both is taken as the built-in corpus; write ./NAME for the folder.
        licence: SPDX name of the licence, where the source does not say it itself.
        field: where rows of JSON and Parquet have their text.

    Raises:
        DataError: nothing is there, or something there may not be read.
    """
    if spec in BUILTIN_CORPORA:
        corpus = BUILTIN_CORPORA[spec]
        return Source(corpus.origin(), corpus.licence, _builtin_files(corpus), field)
    if is_remote(spec) and not spec.startswith("local://"):
        return _open_address(spec, licence, field)
    try:
        path = local_path(spec.removeprefix("local://")).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise DataError(f"source {spec!r}: {error}; give the folder's whole path") from error
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a folder on the way may not be read, a name is too long
        raise DataError(f"source {readable(path)}: cannot be read ({error.strerror}); fix its access") from error
    if is_folder:
        files, not_taken, followed = walk(path)
        if not files:
            aside = f" (not taken: {not_taken})" if not_taken else ""
            raise DataError(
                f"{readable(path)}: the folder holds no files{aside}; give a folder with text, code or rows"
            )
        licence = licence or _find_licence(name for name, _ in files)
        return Source(readable(path.resolve().name), licence, files, field, True, not_taken, followed)
    if not is_file:
        raise DataError(
            f"source {spec!r} is neither a built-in corpus ({', '.join(sorted(BUILTIN_CORPORA))}) nor an existing "
            f"folder or file"
        )
    name = readable(path.name)
    return Source(name, licence or "unknown", [(name, path)], field, False)


def _open_address(spec: str, licence: str | None, field: str) -> Source:
    listed = dict(list_files(spec))
    name = spec.rstrip("/").rpartition("/")[2]
    if list(listed) == [""]:
        return Source(name, licence or "unknown", [(name, listed[""])], field, False)
    names, not_taken = choose(listed)
    if not names:
        raise DataError(f"source {spec!r}: no file to read is there (not taken: {not_taken}); check the address")
    files = [(one, listed[one]) for one in names]
    return Source(name, licence or _find_licence(names), files, field, True, not_taken)


def _builtin_files(corpus: BuiltinCorpus) -> list[tuple[str, Path]]:
    files = corpus.files()
    if not files:
        raise DataError(
            f"built-in corpus {corpus.name}: no source files under {corpus.root()}; this Python is installed without "
            f"its source, give a folder of text or code instead"
        )
    return files


def _find_licence(names: Iterable[str]) -> str:
    there = set(names)
    return next((f"see {name}" for name in _LICENCE_FILES if name in there), "unknown")


def _notes_beside_data(files: Sequence[tuple[str, Path | RemoteFile]], field: str) -> frozenset[str]:
    """The files that are notes on data: README, licence, card, in a folder that has rows in it or below it."""
    notes = [name for name, _ in files if is_about(name)]
    if not notes:
        return frozenset()
    wanted = {name.rpartition("/")[0] for name in notes}
    with_rows: set[str] = set()
    for name, file in files:
        parts = name.split("/")[:-1]
        above = {"/".join(parts[:depth]) for depth in range(len(parts) + 1)} & wanted - with_rows
        if above and not is_about(name) and (holds_rows(name) or _begins_with_rows(name, file, field)):
            with_rows |= above
    return frozenset(name for name in notes if name.rpartition("/")[0] in with_rows)


def _begins_with_rows(name: str, file: Path | RemoteFile, field: str) -> bool:
    """Whether a .json file begins as an array of objects, or as JSON lines, with the text's field."""
    if kind_of(name) != "json":
        return False
    with opened(file, at_once=False) as content:
        head = content.head.removeprefix(_BOM).lstrip()
    array = head.startswith(b"[") and head[1:].lstrip().startswith(b"{")
    return f'"{field}"'.encode() in head and (array or head.startswith(b"{"))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
