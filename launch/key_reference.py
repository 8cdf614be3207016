"""What every key of the configuration means, where it may lie and what it is by default, read from the sections."""

import dataclasses
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from launch import bounds
from launch.config import Config
from launch.schema import show

# "name: text" or "name, name: text" at the start of a line of a docstring
_ENTRY = re.compile(r"^\s*([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)$")


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, its type and range in words, its default as TOML and what it means."""

    dotted: str
    legal: str
    default: str
    meaning: str


@cache
def keys() -> dict[str, Key]:
    """Every key by its dotted path, in the order of the sections."""
    found: dict[str, Key] = {}
    for field in dataclasses.fields(Config):
        _add(typing.cast(Any, field.default_factory), field.name, found)
    return found


def _add(cls: Any, path: str, found: dict[str, Key]) -> None:
    hints, ranges, said = typing.get_type_hints(cls), bounds.ranges(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        dotted = f"{path}.{field.name}"
        nested = [one for one in (hints[field.name], *get_args(hints[field.name])) if dataclasses.is_dataclass(one)]
        if nested:
            _add(nested[0], dotted, found)
            continue
        legal = _kind(hints[field.name])
        if field.name in ranges:
            legal += f", {bounds.in_words(ranges[field.name])}"
        found[dotted] = Key(dotted, legal, show(field.default), said.get(field.name, ""))


def _kind(hint: Any) -> str:
    """A type in words: `an integer`, `a number or none`, `one of "a", "b"`."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(show, inside))
    if type(None) in inside:
        return " or ".join(_kind(one) for one in inside if one is not type(None)) + " or none"
    if origin is tuple:
        return "a list of lists of numbers" if get_origin(inside[0]) is tuple else _list(inside)
    return {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[hint]


def _list(inside: tuple[Any, ...]) -> str:
    many = {str: "texts", float: "numbers", int: "integers"}[inside[0]]
    return f"a list of {many}" if inside[-1] is Ellipsis else f"a list of {len(inside)} {many}"


def meanings(cls: type) -> dict[str, str]:
    """What a section's docstring says about each of its keys: `key: text`, several keys with commas between."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        match = _ENTRY.match(line)
        if match and set(match[1].split(", ")) <= names:
            current = match[1].split(", ")
            found |= dict.fromkeys(current, match[2])
        elif not line.strip():
            current = []
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found


def commented(toml: str) -> str:
    """A whole configuration as TOML with each key's meaning in a comment above it."""
    lines, section = [], ""
    for line in toml.splitlines():
        if match := re.fullmatch(r"\[([a-z_.]+)\]", line):
            section = match[1]
        elif (match := re.match(r"([a-z_0-9]+) = ", line)) and (key := keys().get(f"{section}.{match[1]}")):
            lines += [f"# {part}" for part in textwrap.wrap(f"{key.meaning.rstrip('.')} ({key.legal})", 116)]
        lines.append(line)
    return "\n".join(lines) + "\n"


def explained(name: str) -> str:
    """The keys of one section, or one key, as text; empty where there is none of this name."""
    dotted = [key for key in keys() if key == name or key.startswith(f"{name}.") or key.rpartition(".")[2] == name]
    return "\n".join(_paragraph(keys()[key]) for key in dotted)


def _paragraph(key: Key) -> str:
    body = "\n".join(textwrap.wrap(_sentence(key.meaning), 116, initial_indent="    ", subsequent_indent="    "))
    return f"{key.dotted} = {key.default}\n{body}\n    Legal: {key.legal}.\n"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def page() -> str:
    """docs/configuration.md: every key in a table for each section."""
    lines = [
        "# Configuration",
        "",
        "A configuration is one TOML file, or a preset with `key.path=value` behind it on the command line. This page",
        "is written by `trimtab config --markdown` from the sections' own definitions, where the ranges are checked.",
        "`trimtab config KEY` prints one key or section, `trimtab train CONFIG --print-config` a whole configuration",
        "with comments. A number has to be finite. `none` leaves a key empty that may be left empty. Rules between",
        "keys, such as sizes that have to divide each other, are checked before a run starts as well.",
    ]
    section = ""
    for key in keys().values():
        table = key.dotted.rpartition(".")[0]
        if table != section:
            section = table
            lines += ["", f"## {section}", "", "| key | default | legal | meaning |", "|---|---|---|---|"]
        cells = (f"`{key.dotted}`", f"`{key.default}`", key.legal, _sentence(key.meaning))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
