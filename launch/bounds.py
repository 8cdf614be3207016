"""Legal ranges of configuration keys, written once beside each key: `lr: Annotated[float, "(0, 1000]"]`.

A range is written as in mathematics, `[` and `]` with the end and `(` and `)` without it; ` or ` joins several parts:
"0 or [16, 1e6]". Every number of a list has to be in it. The range serves the check, the reference of all keys
and the tests. This module only reads the text: the sections need nothing of it.
"""

import dataclasses
import math
import re
import typing
from functools import cache
from typing import Annotated, Any, get_args, get_origin

_INTERVAL = re.compile(r"([\[(]) *([^,]+), *([^,]+?) *([\])])")
MAX_TEXT = 4000  # characters: the longest path that common systems take is 4,096 bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """One interval of a range; a single number is an interval of that number alone."""

    low: float
    high: float
    with_low: bool = True
    with_high: bool = True

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; NaN lies nowhere."""
        above = value >= self.low if self.with_low else value > self.low
        return above and (value <= self.high if self.with_high else value < self.high)

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.low)
        low = f"{'from' if self.with_low else 'more than'} {number(self.low)}"
        return f"{low} {'to' if self.with_high else 'to less than'} {number(self.high)}"


@cache
def parts(text: str) -> tuple[Part, ...]:
    """Reads a range.

    Raises:
        ValueError: it is not written as the module's first lines say.
    """
    found = []
    for piece in text.split(" or "):
        match = _INTERVAL.fullmatch(piece.strip())
        if match:
            found.append(Part(float(match[2]), float(match[3]), match[1] == "[", match[4] == "]"))
        else:
            found.append(Part(float(piece), float(piece)))
    return tuple(found)


def number(value: float) -> str:
    """A limit as people write it: `1000000`, `0.5`, `1e-20`, `2**63`."""
    if value == 2.0**63:
        return "2**63"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}" if abs(value) > 9999 else str(int(value))
    return f"{value:g}"


def in_words(text: str) -> str:
    """A range as a phrase: `0, or from 16 to 1,000,000`."""
    return ", or ".join(str(part) for part in parts(text))


@cache
def ranges(cls: Any) -> dict[str, str]:
    """The range of each key of a section's class that has one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {key: get_args(hint)[1] for key, hint in hints.items() if get_origin(hint) is Annotated}


def problems(section: Any, path: str) -> dict[str, str]:
    """What lies outside its range in a section, as key -> sentence; nested sections and their ranges as well.

    Args:
        section: a dataclass. path: its dotted key.
    """
    found: dict[str, str] = {}
    known = ranges(section.__class__)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found |= problems(value, f"{path}.{field.name}")
            continue
        sentence = wrong(f"{path}.{field.name}", value, known.get(field.name))
        if sentence:
            found[f"{path}.{field.name}"] = sentence
    return found


def can_be_compared(section: Any) -> bool:
    """Whether a section's own rules may look at it: its numbers are finite, none is huge, texts are printable."""
    known = ranges(section.__class__)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            if not can_be_compared(value):
                return False
            continue
        most = max(part.high for part in parts(known[field.name])) if field.name in known else 2.0**63
        for leaf in _leaves(value):
            if _wrong_text("", leaf) if isinstance(leaf, str) else not -(2.0**63) <= leaf <= max(most, 1000):
                return False
    return True


def mended(section: Any) -> Any:
    """The same section with the class's default in the place of every value outside its range."""
    known, changes = ranges(section.__class__), {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = mended(value)
        elif wrong("", value, known.get(field.name)):
            changes[field.name] = field.default
    return dataclasses.replace(section, **changes)


def wrong(dotted: str, value: Any, text: str | None) -> str | None:
    """The sentence about a value outside its range, or None; `text` is the range, None where there is no other limit
    than that numbers are finite and texts printable."""
    if isinstance(value, str):
        return _wrong_text(dotted, value)
    for one in _leaves(value):
        if isinstance(one, str):
            if sentence := _wrong_text(dotted, one):
                return sentence
        elif isinstance(one, float) and not math.isfinite(one):
            return f"{dotted} = {_shown(value)} is not a finite number; use {_advice(text)}"
        elif text and not any(part.holds(one) for part in parts(text)):
            return f"{dotted} = {_shown(value)} is out of range; use {_advice(text)}"
    return None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value] if isinstance(value, int | float | str) and not isinstance(value, bool) else []


def _wrong_text(dotted: str, value: str) -> str | None:
    if len(value) > MAX_TEXT:
        return f"{dotted} = {value[:40]!r}... has {len(value):,} characters; use at most {MAX_TEXT:,}"
    if not value.isprintable():  # a NUL ends a path, and half a surrogate pair cannot be written to any file
        return f"{dotted} = {value!r} holds characters that cannot be printed; leave them out"
    return None


def _shown(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _advice(text: str | None) -> str:
    if not text:
        return "a finite number"
    return ", or ".join(f"{'' if part.low == part.high else 'a number '}{part}" for part in parts(text))
