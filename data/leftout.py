"""What packing left out of its sources or changed: counts, bytes and some names for each reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NAMED = 10  # names that are kept for a reason, and
_SHOWN = 5  # names that are shown in a line

EMPTY = "empty"
NOT_UTF8 = "not UTF-8 text"
UTF16 = "UTF-16 text"
BINARY = "unknown binary format"
MEDIA = "picture, sound, font or program"
NOT_A_STRING = "field {} is not a string"
NULL = "field {} is null"
NO_FIELD = "JSON rows without the field {}"
NOT_READ = "{}, which is not read"
POINTER = "Git LFS pointer instead of the file"
ABOUT = "a note beside data (README, licence, card)"
DUPLICATE = "the same text as another document"
HIDDEN = "hidden"
CACHE = "__pycache__"
DANGLING = "link to nothing"
READ_ALREADY = "link to a folder that is read already"
ABOVE = "link to a folder that the source lies in"
FOLLOWED = "link to a folder, followed"
SPECIAL = "not a regular file"
BOM_REMOVED = "byte-order mark removed"

_NO_LOSS = frozenset([EMPTY, ABOUT, DUPLICATE, HIDDEN, CACHE, READ_ALREADY, BOM_REMOVED])
_NO_TEXT = frozenset([MEDIA, SPECIAL, DANGLING, ABOVE])  # left out, and no text is lost by it


@dataclass
class Left:
    """What one reason took: how many files or rows, their bytes as far as known, and the first names."""

    n: int = 0
    n_bytes: int = 0
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = self.n - min(len(self.names), _SHOWN)
        names = ", ".join(printable(name) for name in self.names[:_SHOWN])
        size = f" ({human(self.n_bytes)})" if self.n_bytes else ""
        return f"{self.n:,}{size}: {names}" + (f" and {more:,} more" if more else "")


class LeftOut:
    """What was left out, by reason, in the order in which the reasons came up."""

    def __init__(self) -> None:
        self.reasons: dict[str, Left] = {}

    def add(self, reason: str, name: str, n_bytes: int = 0) -> None:
        """Notes one file or row.

        Args:
            n_bytes: its size; 0 where it is not known.
        """
        left = self.reasons.setdefault(reason, Left())
        left.n += 1
        left.n_bytes += n_bytes
        if len(left.names) < NAMED:
            left.names.append(name)

    def counts(self) -> dict[str, int]:
        """How many by reason, sorted by reason."""
        return {reason: self.reasons[reason].n for reason in sorted(self.reasons)}

    def lost(self) -> LeftOut:
        """Only what may have held text that is now missing."""
        return self._only(lambda reason: reason not in _NO_LOSS and reason not in _NO_TEXT and not _is_null(reason))

    def rows(self) -> int:
        """How many rows were left out since their field is not a string."""
        first, last = NOT_A_STRING.split("{}")
        found = (left.n for reason, left in self.reasons.items() if reason.startswith(first) and reason.endswith(last))
        return sum(found)

    def unread(self) -> LeftOut:
        """Only what was not read, whether it may have held text or not."""
        return self._only(lambda reason: reason not in _NO_LOSS)

    def _only(self, wanted: Any) -> LeftOut:
        part = LeftOut()
        part.reasons = {reason: left for reason, left in self.reasons.items() if wanted(reason)}
        return part

    @property
    def n(self) -> int:
        return sum(left.n for left in self.reasons.values())

    @property
    def n_bytes(self) -> int:
        return sum(left.n_bytes for left in self.reasons.values())

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        return "; ".join(f"{reason}: {left}" for reason, left in self.reasons.items())

    def to_json(self) -> dict[str, Any]:
        """Plain data for pack.json."""
        return {reason: asdict(left) for reason, left in self.reasons.items()}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> LeftOut:
        """What `to_json` gave."""
        made = cls()
        made.reasons = {reason: Left(**left) for reason, left in content.items()}
        return made


@dataclass(frozen=True)
class Account:
    """What became of one source: its name, documents and bytes read, what was left out, what was changed."""

    source: str
    n_documents: int
    n_bytes: int
    left: LeftOut
    changed: LeftOut
    only_about: bool = False  # whether all that was read are notes on data

    def problem(self) -> str:
        """Why the result would be false: more text is left out than read, or only a licence is read. "" if neither."""
        lost = self.left.lost()
        if not lost:
            return ""
        more = lost.n_bytes > self.n_bytes or lost.rows() > self.n_documents
        if self.n_documents and not self.only_about and not more:
            return ""
        read = f"{self.n_documents:,} documents ({human(self.n_bytes)})"
        why = "all of them notes on data" if self.only_about and self.n_documents else "less than what was left out"
        return f"source {printable(self.source)}: only {read} were read, {why}; left out: {lost}"

    def warnings(self) -> list[str]:
        """What should not be overlooked."""
        unread = self.left.unread()
        found = []
        if not self.n_documents:
            found.append(f"source {printable(self.source)} gave no document")
        elif self.problem():
            found.append(self.problem())
        elif unread.n_bytes > self.n_bytes:
            found.append(
                f"source {printable(self.source)}: {human(unread.n_bytes)} were left out, {human(self.n_bytes)} read"
            )
        elif unread.n > self.n_documents:
            found.append(f"source {printable(self.source)}: {unread.n:,} were left out, {self.n_documents:,} read")
        return found

    def lines(self, several: bool) -> list[str]:
        """A line for each reason, and each warning."""
        where = f" of {printable(self.source)}" if several else ""
        lines = [f"  left out{where}, {reason}: {left}" for reason, left in self.left.reasons.items()]
        lines += [f"  changed{where}, {reason}: {left}" for reason, left in self.changed.reasons.items()]
        return lines + [f"  warning: {text}" for text in self.warnings()]

    def to_json(self) -> dict[str, Any]:
        """Plain data for pack.json."""
        return {
            "source": self.source, "documents": self.n_documents, "bytes": self.n_bytes,
            "left_out": self.left.to_json(), "changed": self.changed.to_json(), "only_about": self.only_about,
        }  # fmt: skip

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Account:
        """What `to_json` gave."""
        return cls(
            content["source"], content["documents"], content["bytes"], LeftOut.of(content["left_out"]),
            LeftOut.of(content["changed"]), content["only_about"],
        )  # fmt: skip


def accounts_in(raw: bytes) -> list[Account]:
    """The accounts of every source in the content of pack.json; none where an older version packed."""
    try:
        return [Account.of(entry) for entry in json.loads(raw).get("accounts", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def account_lines(accounts: Iterable[Account]) -> list[str]:
    """What the accounts say, a line for each reason."""
    accounts = list(accounts)
    return [line for account in accounts for line in account.lines(len(accounts) > 1)]


def _is_null(reason: str) -> bool:
    first, last = NULL.split("{}")
    return reason.startswith(first) and reason.endswith(last)


def printable(name: str) -> str:
    """A name as a terminal can show it, control characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)


def human(n_bytes: float) -> str:
    """Bytes in the unit that fits them: 512 bytes, 3.4 kB, 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
