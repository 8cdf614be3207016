"""Builds frozen configuration classes from plain data, and finds every unknown key and wrong type at once.

The classes are standard dataclasses rather than pydantic models: debug mode runs with torch and numpy alone.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin


def parse(cls: type, data: dict[str, Any], path: str, problems: list[str]) -> Any:
    """Builds `cls` from a dictionary.

    Args:
        cls: a dataclass whose fields have defaults and plain types: int, float, bool, str, Literal, tuple, Optional,
            or another such dataclass.
        data: what a TOML table holds.
        path: dotted key of the table, for messages ("" at the top).
        problems: every unknown key and wrong type is appended here, with its key, value and what would be legal.

    Returns:
        An instance; a key with a problem keeps its default.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{path}.{key}" if path else key
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(hints))}"
            problems.append(f"{dotted} is not a known key{hint}")
            continue
        try:
            values[key] = _convert(hints[key], value, dotted, problems)
        except TypeError as wrong:
            problems.append(str(wrong))
    return cls(**values)


def _convert(hint: Any, value: Any, dotted: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if (value is None or value == "none") and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        return _convert(inner[0], value, dotted, problems)
    if origin is Literal:
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(one) for one in get_args(hint)], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{dotted} = {show(value)} must be one of {', '.join(map(show, get_args(hint)))}{hint_text}"
            )
        return value
    if origin in (tuple, list):
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{dotted} = {show(value)} must be a list")
        if kinds[-1] is Ellipsis or origin is list:
            return origin(_convert(kinds[0], item, f"{dotted}[{i}]", problems) for i, item in enumerate(value))
        if len(value) != len(kinds):
            raise TypeError(f"{dotted} = {show(value)} must be a list of {len(kinds)} values")
        return tuple(
            _convert(kind, item, f"{dotted}[{i}]", problems)
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TypeError(f"{dotted} = {show(value)} must be a table")
        return parse(typing.cast(type, hint), value, dotted, problems)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        advice = ""
        if hint in (int, float) and isinstance(value, str):
            advice = "; write it without quotes"
        raise TypeError(
            f"{dotted} = {show(value)} must be {_ARTICLES[hint]}, not {_ARTICLES.get(type(value), 'that')}{advice}"
        )
    return value


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
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value) if abs(value) < 1e16 else f"{value:e}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)


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
    import tomllib

    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"{assignment!r} is not of the form key.path=value, for example train.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ValueError(f"{key} goes through {table}, which is not a table")
    data[last] = value
