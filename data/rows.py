"""Rows of text in JSON lines, in a JSON array of objects, and in Parquet."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError
from data.remote_files import RemoteFile
from data.streams import Content, place_of, reading

_BOM = b"\xef\xbb\xbf"
_LICENCES = ("license", "licence")


class Row(NamedTuple):
    """One row: its number from 1, its text (a string, bytes, or what else is there), its licence, and the
    text's length."""

    number: int
    text: object
    licence: object
    n_bytes: int


class NotRowsError(Exception):
    """A .json file that holds one document, or rows without the field; `why` is NO_ROWS or NO_FIELD."""

    def __init__(self, content: bytes, rows: bool) -> None:
        super().__init__()
        self.content, self.rows = content, rows


def jsonl_rows(content: Content, file: Path | RemoteFile, field: str, begin: bytes = b"") -> Iterator[Row]:
    """The rows of JSON lines; blank lines are no rows.

    Args:
        content: the opened file.
        file: for messages.
        field: the text's field.
        begin: what was read of it already, ending with a line.

    Raises:
        DataError: a line is not a JSON object with that field.
    """
    number = 0
    for lines in (io.BytesIO(begin), content.stream):
        with reading(file):
            for line in lines:
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                if not line.strip():
                    continue
                row = _parsed(line, f"{place_of(file)}, line {number}")
                yield _row(number, row, field, f"{place_of(file)}, line {number}")


def json_rows(content: Content, file: Path | RemoteFile, field: str) -> Iterator[Row]:
    """The rows of a .json file: one array of objects, or JSON lines.

    Raises:
        NotRowsError: before the first row: it is one document, or its first row has no such field.
        DataError: a later row is not an object with that field.
    """
    with reading(file):
        begin = content.stream.readline()
        while begin and not begin.removeprefix(_BOM).strip():
            more = content.stream.readline()
            if not more:
                break
            begin += more
    first = _object(begin)
    if first is not None:
        if field in first:
            yield from jsonl_rows(content, file, field, begin)
            return
        with reading(file):
            rest = content.stream.read()
        following = rest.lstrip().partition(b"\n")[0]
        raise NotRowsError(begin + rest, rows=bool(following) and _object(following) is not None)
    with reading(file):
        whole = begin + content.stream.read()
    yield from _array_rows(whole, file, field)


def _array_rows(whole: bytes, file: Path | RemoteFile, field: str) -> Iterator[Row]:
    """The rows of one JSON array of objects, decoded one after the other."""
    try:
        text = whole.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError:
        raise NotRowsError(whole, rows=False) from None
    decoder, blank = json.JSONDecoder(), json.decoder.WHITESPACE  # type: ignore[attr-defined]
    at = blank.match(text, 0).end()
    if text[at : at + 1] != "[":
        raise NotRowsError(whole, rows=False)
    number, at = 0, blank.match(text, at + 1).end()
    while text[at : at + 1] != "]" or number:
        number += 1
        where = f"{place_of(file)}, row {number}"
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if number == 1:
                raise NotRowsError(whole, rows=False) from error
            raise DataError(f"{where}: is not JSON ({_why(error)}); repair the file or leave it out") from error
        if number == 1 and not (isinstance(row, dict) and field in row):
            raise NotRowsError(whole, rows=isinstance(row, dict))
        yield _row(number, row, field, where)
        at = blank.match(text, end).end()
        mark = text[at : at + 1]
        if mark == "]":
            if text[at + 1 :].strip():
                raise DataError(f"{where}: text follows the array's end; write one array, or one object a line")
            return
        if mark != ",":
            raise DataError(f"{where}: neither , nor ] follows, the file may be cut off; fetch it again")
        at = blank.match(text, at + 1).end()
    raise NotRowsError(whole, rows=False)


def parquet_rows(content: Content, file: Path | RemoteFile, field: str) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is not one, has no such column of strings or bytes, or is damaged; or pyarrow is not installed.
    """
    where = place_of(file)
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise DataError(f"{where}: reading Parquet needs the package pyarrow; pip install pyarrow") from error
    with reading(file):
        source: Any = content.stream if not content.compression else io.BytesIO(content.stream.read())
    try:
        table = pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where}: is not a readable Parquet file ({error}); fetch it again") from error
    schema = table.schema_arrow
    if field not in schema.names:
        raise DataError(_no_field(where, field, schema.names, "columns"))
    kind = schema.field(field).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not re.fullmatch(r"(large_)?(string|binary)(_view)?|fixed_size_binary\[\d+\]", str(plain)):
        raise DataError(f"{where}: the column {field} holds {kind}, not text; give the text's column with --field")
    wanted = [column for column in dict.fromkeys(schema.names) if column in (field, *_LICENCES)]
    number = 0
    for group in range(table.num_row_groups):
        batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=wanted)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                break
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise DataError(
                    f"{where}, row group {group}, after row {number}: is damaged ({error}); fetch the file again"
                ) from error
            for row in rows:
                number += 1
                yield _made(number, row, field)


def _object(line: bytes) -> dict | None:
    """The JSON object that a line is; None if it is none."""
    try:
        found = json.loads(line.removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is not a JSON object in UTF-8 ({_why(error)}); write one object a line, for example "
            f'{{"text": "..."}}'
        ) from error


def _why(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _row(number: int, row: object, field: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f'{where}: is a JSON {_json_type(row)}, not an object; write for example {{"{field}": "..."}}')
    if field not in row:
        raise DataError(_no_field(where, field, list(row), "fields"))
    return _made(number, row, field)


def _made(number: int, row: dict, field: str) -> Row:
    text = row[field]
    licence = next((row[name] for name in _LICENCES if row.get(name)), None)
    return Row(number, text, licence, len(text) if isinstance(text, str | bytes) else 0)


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _no_field(where: str, field: str, there: list[str], kind: str) -> str:
    named = ", ".join(ascii(name)[1:-1] for name in there[:20]) + (", ..." if len(there) > 20 else "")
    return (
        f"{where}: has no field {field}; its {kind} are {named or '(none)'}; give the text's with --field NAME, or "
        f"leave the file out"
    )
