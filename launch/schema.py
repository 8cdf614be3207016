"""Builds frozen configuration classes from plain data, and finds every unknown key and wrong type at once.

The classes are standard dataclasses rather than pydantic models: debug mode runs with torch and numpy alone.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from launch.unsupported import answer


def parse(cls: type, data: dict[str, Any], path: str, problems: list[str], root: type | None = None) -> Any:
    """Builds `cls` from a dictionary.

    Args:
        cls: a dataclass whose fields have defaults and plain types: int, float, bool, str, Literal, tuple, Optional,
            or another such dataclass.
        data: what a TOML table holds.
        path: dotted key of the table, for messages ("" at the top).
        problems: every unknown key and wrong type is appended here, with its key, value and what would be legal.
        root: the whole configuration's class, where a key of another section is looked for; None is `cls`.

    Returns:
        An instance; a key with a problem keeps its default.
    """
    hints = _hints(cls)
    root = root or cls
    values: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{path}.{key}" if path else key
        if key not in hints:
            problems.append(f"{dotted} is not a known key; {_instead(key, dotted, value, list(hints), root)}")
            continue
        try:
            values[key] = _convert(hints[key], value, dotted, problems, root)
        except TypeError as wrong:
            problems.append(str(wrong))
    return cls(**values)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _instead(key: str, dotted: str, value: Any, here: list[str], root: type) -> str:
    """What somebody who wrote an unknown key may have meant."""
    if sentence := answer(dotted, value):
        return sentence
    if same := places(root).get(key):
        return f"did you mean {' or '.join(f'`{place}`' for place in same)}?"
    if near := difflib.get_close_matches(key, here, n=1, cutoff=0.5):
        return f"did you mean `{near[0]}`?"
    return f"known keys: {', '.join(sorted(here))}"


@cache
def places(root: type) -> dict[str, list[str]]:
    """Where each key of a configuration stands: its last name -> dotted keys."""
    found: dict[str, list[str]] = {}

    def look(cls: type, path: str) -> None:
        for key, hint in typing.get_type_hints(cls).items():
            dotted = f"{path}.{key}" if path else key
            inner = [one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)]
            if inner:
                look(typing.cast(type, inner[0]), dotted)
            else:
                found.setdefault(key, []).append(dotted)

    look(root, "")
    return found


def _convert(hint: Any, value: Any, dotted: str, problems: list[str], root: type) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if (value is None or value == "none") and type(None) in options:
            return None
        if isinstance(value, str) and value.lower() in ("null", "none", "") and type(None) in options:
            raise TypeError(f"{dotted} = {brief(value)} is not the way to leave a key empty; write none")
        inner = [option for option in options if option is not type(None)]
        return _convert(inner[0], value, dotted, problems, root)
    if origin is Literal:
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(one) for one in get_args(hint)], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            if sentence := answer(dotted, value):
                hint_text = f"; {sentence}"
            raise TypeError(
                f"{dotted} = {brief(value)} must be one of {', '.join(map(show, get_args(hint)))}{hint_text}"
            )
        return value
    if origin in (tuple, list):
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{dotted} = {brief(value)} must be a list")
        if kinds[-1] is Ellipsis or origin is list:
            return origin(_convert(kinds[0], item, f"{dotted}[{i}]", problems, root) for i, item in enumerate(value))
        if len(value) != len(kinds):
            raise TypeError(f"{dotted} = {brief(value)} must be a list of {len(kinds)} values")
        return tuple(
            _convert(kind, item, f"{dotted}[{i}]", problems, root)
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TypeError(f"{dotted} = {brief(value)} must be a table")
        return parse(typing.cast(type, hint), value, dotted, problems, root)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError(f"{dotted} = {brief(value)} is out of range of a number; use a smaller one") from None
    if hint in (int, float, str, bool) and type(value) is not hint:
        advice = ""
        if hint in (int, float) and isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            advice = "; write it without quotes"
        elif hint in (int, float) and isinstance(value, str) and value.strip().lower() in ("none", "null", ""):
            advice = "; this key cannot be left empty"
        elif hint is str:
            advice = f"; in quotes it is one: '{dotted}=\"{brief(value)}\"'"
        raise TypeError(
            f"{dotted} = {brief(value)} must be {_ARTICLES[hint]}, not {_ARTICLES.get(type(value), 'that')}{advice}"
        )
    return value


_NUMBER = re.compile(r"[+-]?(\d[\d_]*)?\.?\d+([eE][+-]?\d+)?")
_ARTICLES: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def show(value: Any) -> str:
    """A value as TOML would write it."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, float):
        return repr(value) if abs(value) < 1e16 else f"{value:e}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to write out integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def brief(value: Any) -> str:
    """A value as TOML would write it, cut where it is long, for messages."""
    text = show(value)
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text):,} characters)"


def to_toml(config: Any, path: str = "") -> str:
    """A dataclass of dataclasses as TOML; None becomes "none", which `parse` reads back."""
    plain, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            dotted = f"{path}.{field.name}" if path else field.name
            tables.append(f"[{dotted}]\n{to_toml(value, dotted)}")
        else:
            plain.append(f"{field.name} = {show(value)}")
    return "\n".join(plain + ([""] if plain and tables else []) + tables) + ("\n" if plain and not tables else "")


def override(data: dict[str, Any], assignment: str) -> None:
    """Applies one `key.path=value` of the command line to nested tables, in place.

    The value is read as TOML where it is TOML (numbers, true, lists, quoted text), else as text.

    Raises:
        ValueError: when the argument has no `=`.
    """

    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"{assignment!r} is not of the form key.path=value, for example train.steps=50")
    *tables, last = key.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ValueError(f"{key} goes through {table}, which is not a table")
    value = _value(text)
    if isinstance(value, dict) and isinstance(data.get(last), dict):
        data[last] = data[last] | value  # a table names single keys too; the others stay
    else:
        data[last] = value


def _value(text: str) -> Any:
    """A value of the command line: TOML where it is TOML, else the text itself."""
    import tomllib

    try:
        read = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or an integer of thousands of digits
        return text
    # A line break or a comment would end the value and hide the rest.
    whole = len(read) == 1 and "\n" not in text and ("#" not in text or isinstance(read["value"], str))
    return read["value"] if whole else text
