"""The picture of `trimtab bench scaling`: what the efficiency of each size was lost to, stacked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.bench_scaling_parts import ALL_TO_ALL, COMPUTE, DATA, OPTIMIZER, PARTS, REST, WAITING, ZERO
from launch.plots import BLUE, GREEN, GREY, ORANGE

COLOURS: Mapping[str, str] = {
    COMPUTE: BLUE, OPTIMIZER: "#56B4E9", ZERO: "#CC79A7", ALL_TO_ALL: ORANGE, WAITING: "#E69F00", DATA: GREEN,
    REST: GREY,
}  # fmt: skip


def plot(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> bool:
    """One panel a mode, one bar a size and routing; False without matplotlib.

    Parts that became cheaper hang below zero; the black mark is the sum, one less the efficiency.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(1.5 + 4.6 * len(modes), 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _bars(axes, [row for row in rows if row["mode"] == mode and row["ranks"] != facts["base"]])
        axes.set_title(f"{mode} scaling", loc="left", fontsize=10)
    panels[0].set_ylabel("efficiency lost, % of the time at that size")
    where = facts["machine"]
    figure.suptitle(
        f"{facts['preset']}, base {facts['base']} rank{'s' if facts['base'] > 1 else ''}; {where['cores']} cores, "
        f"{facts['launcher']} launcher; * more processes than cores",
        x=0.01, ha="left", fontweight="bold", fontsize=10,
    )  # fmt: skip
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS) + 1, frameon=False, fontsize=8,
                  handlelength=3.5)  # fmt: skip
    figure.savefig(path)
    return True


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [f"{row['ranks']}{'*' if row.get('note') else ''} ranks\n{row['routing']}" for row in rows]
    above, below = [0.0] * len(rows), [0.0] * len(rows)
    for part in PARTS:
        lost = [100 * row["lost"][part] for row in rows]
        foot = [up if one >= 0 else down for one, up, down in zip(lost, above, below, strict=True)]
        axes.bar(names, lost, bottom=foot, color=COLOURS[part], label=part, width=0.6)
        above = [up + max(0.0, one) for one, up in zip(lost, above, strict=True)]
        below = [down + min(0.0, one) for one, down in zip(lost, below, strict=True)]
    total = [100 * (1 - row["efficiency"].median) for row in rows]
    axes.plot(names, total, "_", color="black", markersize=34, markeredgewidth=2, label="sum")
    for place, (row, top) in enumerate(zip(rows, above, strict=True)):
        text = f"efficiency {row['efficiency'].median:.2f}"
        axes.annotate(text, (place, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.08)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
