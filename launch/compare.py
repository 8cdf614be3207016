"""Several runs side by side: a table of the figures that people compare, and the keys in which they differ."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.heatmap import spread
from launch.report import summarize
from launch.runfolder import RunFolder, read_records
from launch.telemetry import dotted

MAX_CURVE_ROWS = 20

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
        run's newest evaluation. Runs that evaluated while they trained have one more table, held-out loss by step, and
        `heldout_curve` in their figures.
    """
    figures = {str(run): {**summarize(run), **heldout(run)} for run in runs}
    rows = [["run", *(title for title, _, _ in _COLUMNS)]]
    for run, values in figures.items():
        cells = [values.get(key) for _, key, _ in _COLUMNS]
        shown = [format(value, pattern) if value is not None else "-"
                 for value, (_, _, pattern) in zip(cells, _COLUMNS, strict=True)]  # fmt: skip
        rows.append([run, *shown])
    text = columns(rows)
    curves = {run: dict(values["heldout_curve"]) for run, values in figures.items() if "heldout_curve" in values}
    if curves:
        text += "\n\nheld-out loss, nats a token, behind each step\n" + columns(_curve_rows(curves))
    differing = differing_keys(runs)
    if len(runs) > 1:
        text += "\n\n" + (columns([["key", *figures], *differing]) if differing else "The configurations are the same.")
    for number, run in enumerate(figures, start=1):
        figures[run]["differs_in"] = {row[0]: row[number] for row in differing}
    return text, figures


def heldout(run: str | Path) -> dict[str, Any]:
    """A run's newest held-out loss and bits per byte, and its curve, (step, loss) in order, as far as it has them."""
    folder, names = RunFolder(run), ("heldout_loss", "heldout_bits_per_byte")
    found: dict[str, Any] = {}
    measured = [record for record in folder.committed("metrics") if record.get("heldout_loss") is not None]
    if measured:
        found = {name: measured[-1][name] for name in names if measured[-1].get(name) is not None}
        found["heldout_curve"] = [(record["step"], record["heldout_loss"]) for record in measured]
    events = [event for event in read_records(folder.events_path) if event["kind"] == "evaluation"]
    if events and (not measured or events[-1].get("step", 0) >= measured[-1]["step"]):  # behind the end of training
        given = (events[-1].get("heldout_loss"), events[-1].get("bits_per_byte"))
        found |= {name: value for name, value in zip(names, given, strict=True) if value is not None}
    return found


def _curve_rows(curves: dict[str, dict[int, float]]) -> list[list[str]]:
    """A row a step, thinned evenly to MAX_CURVE_ROWS; a column a run."""
    steps = sorted(set().union(*curves.values()))
    shown = [steps[i] for i in spread(len(steps), MAX_CURVE_ROWS)]
    return [
        ["step", *curves],
        *([str(step), *(f"{curve[step]:.4f}" if step in curve else "-" for curve in curves.values())]
          for step in shown),
    ]  # fmt: skip


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
