"""Several runs side by side: a table of the figures that people compare, and the keys in which they differ."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.report import summarize
from launch.runfolder import RunFolder, read_records
from launch.telemetry import dotted

_COLUMNS = (
    ("steps", "steps", "d"),
    ("loss last", "loss_last", ".3f"),
    ("held-out loss", "heldout_loss", ".4f"),
    ("bits per byte", "heldout_bits_per_byte", ".4f"),
    ("max_vio first", "max_vio_first", ".2f"),
    ("max_vio last", "max_vio_last", ".2f"),
    ("noise floor", "max_vio_floor", ".2f"),
    ("max_vio_rank last", "max_vio_rank_last", ".3f"),
    ("bias_abs_max", "bias_abs_max", ".3f"),
    ("tokens/s", "tokens_per_second", ",.0f"),
)


def compare(runs: list[Path]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Figures of each run from its own files.

    Args:
        runs: folders of runs.

    Returns:
        Tables for people, one row a run and one row a key in which they differ, and the figures by run. "first" and
        "last" are means over the first and last tenth of the run, at most 20 steps; held-out figures are those of the
        run's last evaluation.
    """
    figures = {str(run): {**summarize(run), **heldout(run)} for run in runs}
    rows = [["run", *(title for title, _, _ in _COLUMNS)]]
    for run, values in figures.items():
        cells = [values.get(key) for _, key, _ in _COLUMNS]
        shown = [format(value, pattern) if value is not None else "-"
                 for value, (_, _, pattern) in zip(cells, _COLUMNS, strict=True)]  # fmt: skip
        rows.append([run, *shown])
    text = columns(rows)
    differing = differing_keys(runs)
    if len(runs) > 1:
        text += "\n\n" + (columns([["key", *figures], *differing]) if differing else "The configurations are the same.")
    for number, run in enumerate(figures, start=1):
        figures[run]["differs_in"] = {row[0]: row[number] for row in differing}
    return text, figures


def heldout(run: str | Path) -> dict[str, float]:
    """Held-out loss and bits per byte of a run's last evaluation, as far as it has them."""
    events = read_records(RunFolder(run).events_path)
    last: dict[str, Any] = next((event for event in reversed(events) if event["kind"] == "evaluation"), {})
    names = {"heldout_loss": "heldout_loss", "bits_per_byte": "heldout_bits_per_byte"}
    return {name: last[key] for key, name in names.items() if last.get(key) is not None}


def differing_keys(runs: Sequence[str | Path]) -> list[list[str]]:
    """Rows of a key and each run's value, for every key of the resolved configurations that is not the same in all."""
    tables = [dotted(tomllib.loads(RunFolder(run).config.read_text(encoding="utf-8"))) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [[key, *(str(table.get(key, "-")) for table in tables)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
