"""Plain tar files that somebody else wrote: which of their members are documents; all headers are read before any text.

A document is a member `*.txt`, or the field "text" of a member `*.json` beside which no `*.txt` has the same name up to
its last dot. Names may hold any number of dots. Nothing is unpacked, unpickled or run.
"""

from __future__ import annotations

import glob
import json
import lzma
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.members import member_problem

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # what Python's tarfile reads
UNREAD = (".tar.zst", ".tar.zstd", ".tzst", ".tar.lz4", ".tar.lz", ".tar.br", ".tar.z", ".tar.lzo", ".tar.lzma", ".zip")
_CHUNK = 1 << 20
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
_FETCH = "fetch it again, or take it out of data.path"


class Document(NamedTuple):
    """One member that was read for its text: the text, or None and the reason why there is none."""

    name: str
    text: str | None
    left_out: str = ""


@dataclass
class Contents:
    """What the headers of one tar file, or of several together, tell.

    Attributes:
        n_members: regular files.
        n_txt: members `*.txt`, each a document.
        n_json: members `*.json` without a `*.txt` of their name; each is a document where its field text is a string.
        others: members that are never read, by their last suffix (".png", ".json beside .txt", "no suffix").
        empty: tar files without any member.
        stems: names of the `*.txt` without their suffix, of one file in which a `*.json` has such a name.
    """

    n_members: int = 0
    n_txt: int = 0
    n_json: int = 0
    others: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    stems: frozenset[str] = frozenset()

    @property
    def n_candidates(self) -> int:
        """Members that are read for a text."""
        return self.n_txt + self.n_json

    def __str__(self) -> str:
        return f"{self.n_txt:,} members *.txt and {self.n_json:,} *.json" + (
            f"; {self.others.total():,} other members are not read ({_counted(self.others)})" if self.others else ""
        )


def plain_tars(path: str) -> tuple[list[str], list[str]]:
    """The tar files that data.path means in mode "stream", sorted, and what else lies in a folder and is not read.

    Args:
        path: a folder, a file or a pattern.

    Raises:
        DataError: there are none, one is a link to nothing, or a folder holds archives of a kind that is not read.
    """
    is_folder = Path(path).is_dir()
    found = sorted(glob.glob(str(Path(glob.escape(path)) / "*")) if is_folder else glob.glob(path))
    if not found and Path(path).is_file():
        found = [path]  # a name with brackets in it is no pattern
    files, others = [], []
    for name in found:
        if (is_folder and not name.lower().endswith(SUFFIXES)) or Path(name).is_dir():
            others.append(name)
        elif not Path(name).is_file():
            raise DataError(f"{shown(name)} is no file, or a link to nothing; repair it, or take it out of data.path")
        else:
            files.append(name)
    unread = [name for name in others if name.lower().endswith(UNREAD) and not Path(name).is_dir()]
    if unread:
        raise DataError(
            f"{path}: {named(unread)}: this compression is not read (gzip, bzip2 and xz are); unpack it to *.tar, or "
            "take it out of data.path"
        )
    if not files:
        beside = f" (it holds {named(others)})" if others else ""
        raise DataError(
            f'data.path = {path}: no tar file there{beside}; data.mode = "stream" wants a folder or pattern of them'
        )
    return files, others


def survey(files: Iterable[str]) -> dict[str, Contents]:
    """Reads every header of every file, and texts until the first usable one: what would stop a run is found before it.

    A compressed file is read to its end for that. Of plain ones only the headers are.

    Raises:
        DataError: a file is empty, cut, damaged or no tar file; it holds something else than files and folders, or a
            document's name twice; or no file holds a text. Names file and member; every bad file is named.
    """
    found: dict[str, Contents] = {}
    problems, usable, reasons = [], False, Counter[str]()
    for file in files:
        try:
            contents = found[file] = contents_of(file)
            if not usable and contents.n_candidates:
                for document in documents(file, contents):
                    if document.text is not None:
                        usable = True
                        break
                    reasons[document.left_out] += 1
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - 10} more files" if len(problems) > 10 else ""
        raise DataError("; ".join(problems[:10]) + more)
    if not usable:
        together = total(found.values())
        held = f"{together.n_members:,} members in all"
        if together.others:
            held += f"; never read are {_counted(together.others)}"
        if reasons:
            held += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        first = next(iter(found), "data.path")
        raise DataError(f"{first} and on: no sample has a member txt, or json with a field text ({held})")
    return found


def total(contents: Iterable[Contents]) -> Contents:
    """The sum over several files."""
    sums = Contents()
    for one in contents:
        sums.n_members += one.n_members
        sums.n_txt += one.n_txt
        sums.n_json += one.n_json
        sums.others += one.others
        sums.empty += one.empty
    return sums


def contents_of(file: str) -> Contents:
    """Reads one file's headers.

    Raises:
        DataError: as in `survey`.
    """
    contents = Contents()
    seen: dict[str, int] = {}  # documents' names as tar writes them, ./a as a, and where
    txt, jsons = set[str](), []
    for member, _ in _members(file):
        if not member.isreg():
            continue
        contents.n_members += 1
        stem, suffix = _split(member.name)
        if suffix not in (".txt", ".json"):
            contents.others[suffix or "without a suffix"] += 1
            continue
        before = seen.setdefault(posixpath.normpath(member.name), member.offset)
        if before != member.offset:
            raise DataError(
                f"{shown(file)}: holds the member {shown(member.name)} twice, at byte {before} and at byte "
                f"{member.offset}, and which of the two is meant is not known; unpack the archive (tar keeps the last "
                "one) and pack it again, or give the two different names"
            )
        contents.n_txt += suffix == ".txt"
        if suffix == ".txt":
            txt.add(stem)
        else:
            jsons.append(stem)
    beside = sum(stem in txt for stem in jsons)
    contents.n_json = len(jsons) - beside
    if beside:
        contents.others[".json beside .txt"] = beside
        contents.stems = frozenset(txt)
    if not contents.n_members:
        contents.empty.append(file)
    return contents


def documents(file: str, contents: Contents) -> Iterator[Document]:
    """Reads one file's documents, in the order in which they lie.

    Args:
        contents: of this file, see `contents_of`.

    Raises:
        DataError: the file changed since, or cannot be read; names the member.
    """
    for member, tar in _members(file):
        stem, suffix = _split(member.name)
        if not member.isreg() or suffix not in (".txt", ".json") or (suffix == ".json" and stem in contents.stems):
            continue
        with _naming(file, [member.name]):
            source = tar.extractfile(member)
            payload = source.read() if source is not None else b""
        yield Document(member.name, *_text(suffix, payload))


def shown(name: str) -> str:
    """A member's or file's name as text that any terminal and log takes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def named(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    most = [shown(Path(name).name) for name in names[:5]]
    return ", ".join([*most, f"and {len(names) - 5} more"] if len(names) > 5 else most)


def _text(suffix: str, payload: bytes) -> tuple[str | None, str]:
    """A member's text and "", or None and why there is none."""
    try:
        text = payload.decode("utf-8") if suffix == ".txt" else json.loads(payload)["text"]
    except UnicodeDecodeError:
        return None, "not UTF-8 text"
    except (KeyError, TypeError, ValueError, RecursionError):
        return None, "json without a field text"
    if not isinstance(text, str):
        return None, "json without a field text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
        return None, "not UTF-8 text"
    return (text, "") if text.strip() else (None, "empty")


@contextmanager
def _naming(file: str, last: list[str]) -> Iterator[None]:
    """Turns what goes wrong in an archive into an error with the file's name and, where there was one, the member's."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, tarfile.ReadError) and not last and Path(file).stat().st_size == 0:
            raise DataError(f"{shown(file)} is 0 bytes long; {_FETCH}") from error
        if isinstance(error, PermissionError):
            raise DataError(f"{shown(file)} may not be read ({error.strerror}); give this user the right to") from error
        if not last:
            said = str(error).split("\n")[0].rstrip(":")
            raise DataError(
                f"{shown(file)} is not a tar file, or its beginning is damaged ({said}); {_FETCH}"
            ) from error
        raise DataError(
            f"{shown(file)}: the file is cut or damaged in or behind the member {shown(last[0])} ({error}); {_FETCH}"
        ) from error


def _members(file: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Every member with its archive; stricter than tarfile, for which a damaged header is the end of the archive.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    last: list[str] = []
    with _naming(file, last), tarfile.open(file, "r:*") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise, and archives may hold millions
            problem = member_problem(member.name, member.type)
            if not problem and member.issparse():
                problem = f"holds the sparse file {member.name!r}; a shard holds regular files only"
            if problem:
                raise DataError(f"{shown(file)}: {problem}; take it out of data.path, or pack the data it came from")
            last[:] = [member.name]
            yield member, tar
        if problem := _end_problem(tar):
            behind = f" (behind the member {shown(last[0])})" if last else ""
            raise DataError(f"{shown(file)}: {problem}{behind}; {_FETCH}")


def _end_problem(tar: tarfile.TarFile) -> str:
    """Why the archive does not end as it should, "" where it does."""
    source, at = tar.fileobj, tar.offset
    if source is None:
        return ""
    source.seek(at)
    block = source.read(tarfile.BLOCKSIZE)
    if not block:
        return "the file ends without the archive's closing blocks: it was cut, or never finished"
    if len(block) < tarfile.BLOCKSIZE:
        return f"the file ends inside the tar header at byte {at}"
    if block.strip(b"\0"):
        return f"the tar header at byte {at} is damaged, and what follows it cannot be read"
    while chunk := source.read(_CHUNK):
        if chunk.strip(b"\0"):
            return (
                f"the archive is closed at byte {at}, but more data follows, which tar readers do not see (several "
                "archives in one file are joined with `tar -A`, not with `cat`)"
            )
    return ""


def _split(name: str) -> tuple[str, str]:
    """("a/www.example.org.1", ".txt") of "./a/www.example.org.1.txt"; the suffix in lower case."""
    stem, suffix = posixpath.splitext(posixpath.normpath(name))
    if not suffix and posixpath.basename(stem).startswith("."):  # the whole name is ".txt"
        folder, base = posixpath.split(stem)
        stem, suffix = posixpath.join(folder, ""), base
    return stem, suffix.lower()


def _counted(counts: Counter[str]) -> str:
    most = [f"{count:,} {shown(suffix)}" for suffix, count in counts.most_common(8)]
    return ", ".join([*most, "..."] if len(counts) > 8 else most)
