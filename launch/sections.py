"""Where each rank is: the section and step it is in, in a small file that outlives the process.

A rank overwrites one line at the start of every section (`pwrite`, a microsecond): a killed process leaves its place
behind, and whoever watches from outside needs nothing of the rank's cooperation.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.causes import Place
from cluster.places import parse_line, place_line, section_file


class Sections:
    """One rank's place; `mark` is called at the start of each section.

    Args:
        folder: the run's logs. rank: whose place it is. generation: of this process.
    """

    def __init__(self, folder: Path, rank: int, generation: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.generation = generation
        self._now: tuple[str, int | None] = ("start", None)
        self._fd = os.open(section_file(folder, rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def mark(self, section: str, step: int | None = None) -> None:
        """Notes that a section begins. step: 1-based, None before the first. A full disk does not matter here."""
        self._now = (section, step)
        try:
            os.pwrite(self._fd, place_line(self.generation, section, step, time.time()), 0)
        except OSError:
            return

    @contextmanager
    def inside(self, section: str) -> Iterator[None]:
        """A section inside another one, which is marked again at the end."""
        outer = self._now
        self.mark(section, outer[1])
        try:
            yield
        finally:
            self.mark(*outer)

    def close(self) -> None:
        """Closes the file and leaves it."""
        os.close(self._fd)


def read_place(folder: Path, generation: int, rank: int | None = None) -> Place:
    """Where a rank of this generation was last; "start" when it has not said anything yet.

    Args:
        rank: None takes the rank that came furthest.
    """
    files = [section_file(folder, rank)] if rank is not None else sorted(folder.glob("rank-*.at"))
    places = [place for file in files if (place := _read(file, generation)) is not None]
    return max(places, key=lambda place: (place.step or 0, place.seen_at), default=Place())


def _read(file: Path, generation: int) -> Place | None:
    try:
        return parse_line(file.read_text(), generation)
    except (OSError, ValueError):  # not there yet, or no text after a crash of the machine
        return None
