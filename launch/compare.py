"""Several runs side by side: a table of the figures that people compare."""

from pathlib import Path
from typing import Any

from launch.report import summarize

_COLUMNS = (
    ("steps", "steps", "d"),
    ("loss last", "loss_last", ".3f"),
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
        A table for people, one row a run, and the figures by run. "first" and "last" are means over the first and last
        tenth of the run, at most 20 steps.
    """
    figures = {str(run): summarize(run) for run in runs}
    rows = [["run", *(title for title, _, _ in _COLUMNS)]]
    for run, values in figures.items():
        cells = [values.get(key) for _, key, _ in _COLUMNS]
        shown = [format(value, pattern) if value is not None else "-"
                 for value, (_, _, pattern) in zip(cells, _COLUMNS, strict=True)]  # fmt: skip
        rows.append([run, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines), figures
