"""The files of a source: below a local folder, links followed, or below an address, chosen by the same rules."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from data.errors import DataError
from data.leftout import ABOVE, CACHE, DANGLING, FOLLOWED, HIDDEN, READ_ALREADY, SPECIAL, LeftOut


def walk(root: Path) -> tuple[list[tuple[str, Path]], LeftOut, LeftOut]:
    """Regular files below a folder by sorted relative name, what was not taken, and the links to folders that were
    followed.

    Links to files are read. Links to folders are followed after everything else, in sorted order; a folder that was
    read already, by its device and inode, is not read again, so that loops end, and neither is one that the source
    lies in. Hidden names and __pycache__ are not taken.

    Raises:
        DataError: a folder or a file may not be read.
    """
    found: dict[str, Path] = {}
    aside: list[tuple[str, str]] = []  # (name, reason)
    followed = LeftOut()
    seen: set[tuple[int, int]] = set()
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
    links: list[tuple[str, Path]] = [("", root)]
    while links:
        waiting, links = sorted(links), []
        for prefix, start in waiting:
            if _identity(start) in above:
                aside.append((prefix, ABOVE))
                continue
            if not _is_new(start, seen):
                aside.append((prefix, READ_ALREADY))
                continue
            if prefix:
                followed.add(FOLLOWED, prefix)
            links += _walk_real(prefix, start, found, aside, seen)
    left = LeftOut()
    for name, reason in sorted(aside):  # as `choose` meets them
        left.add(reason, name)
    return sorted(found.items()), left, followed


def _walk_real(
    prefix: str, start: Path, found: dict[str, Path], aside: list[tuple[str, str]], seen: set[tuple[int, int]]
) -> list[tuple[str, Path]]:
    """Takes the files of a folder and its real subfolders; returns the links to folders, with their names."""
    links = []
    waiting = [(prefix, start)]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                name = f"{prefix}/{readable(entry.name)}" if prefix else readable(entry.name)
                path = Path(entry.path)
                if reason := _set_aside(entry.name):
                    aside.append((name + "/" if path.is_dir() else name, reason))
                elif entry.is_symlink() and not _leads_somewhere(path):
                    aside.append((name, DANGLING))
                elif entry.is_symlink() and entry.is_dir():
                    links.append((name, path))
                elif entry.is_dir():
                    if _is_new(path, seen):
                        waiting.append((name, path))
                    else:  # a mounted folder that is there twice, or one that a link has led to before
                        aside.append((name, READ_ALREADY))
                elif not path.is_file():
                    aside.append((name, SPECIAL))
                elif not os.access(path, os.R_OK):
                    raise DataError(
                        f"{readable(path)}: cannot be read (Permission denied); fix its access or move it out of the "
                        f"source"
                    )
                else:
                    found[_unique(name, found)] = path
        except OSError as error:
            raise DataError(
                f"{readable(folder)}: the folder cannot be read ({error.strerror}), and its files would be missing; "
                f"fix its access or move it out of the source"
            ) from error
    return links


def choose(names: Iterable[str]) -> tuple[list[str], LeftOut]:
    """The names to take of all files below an address, sorted, and what was not taken, by the rules of `walk`."""
    taken, left = [], LeftOut()
    noted: set[str] = set()
    for name in sorted(names):
        parts = name.split("/")
        for depth, part in enumerate(parts):
            if reason := _set_aside(part):
                whole = "/".join(parts[: depth + 1]) + ("/" if depth + 1 < len(parts) else "")
                if whole not in noted:
                    noted.add(whole)
                    left.add(reason, whole)
                break
        else:
            taken.append(name)
    return taken, left


def readable(name: str | Path) -> str:
    """A file's name as text: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _set_aside(part: str) -> str:
    return HIDDEN if part.startswith(".") else CACHE if part == "__pycache__" else ""


def _leads_somewhere(link: Path) -> bool:
    try:
        link.stat()
    except PermissionError:
        raise
    except OSError:  # nothing is there, or links that lead round in a circle
        return False
    return True


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder is met for the first time; notes it."""
    key = _identity(folder)
    new = key not in seen
    seen.add(key)
    return new


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unique(name: str, found: dict[str, Path]) -> str:
    """The name, numbered where two different byte strings read alike."""
    number, candidate = 1, name
    while candidate in found:
        number += 1
        candidate = f"{name} #{number}"
    return candidate
