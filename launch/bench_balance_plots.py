"""Pictures of `trimtab bench balance`: loss against balance, and max_vio over the steps by rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.plots import BLUE, GREEN, GREY, ORANGE, running_mean

COLOURS: Mapping[str, str] = {
    "sign": BLUE, "proportional": GREEN, "quantile": ORANGE, "aux_loss": "#CC79A7", "none": GREY, "top-2": "#56B4E9",
    "aux_loss-0.001": "#882255",
    "dense": "black",
}  # fmt: skip
SPARE = ("#E69F00", "#F0E442", "#44AA99")


def plot(results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], out: Path, name: str) -> list[Path]:
    """Draws NAME.png and NAME-steps.png; nothing without matplotlib.

    Returns:
        The files that were written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    colours = {row["arm"]: _colour(row["arm"], number) for number, row in enumerate(rows)}
    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    _against(figure.add_subplot(), results, rows, colours)
    against = out / f"{name}.png"
    figure.savefig(against)
    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    _over_steps(figure.add_subplot(), results, rows, colours)
    over_steps = out / f"{name}-steps.png"
    figure.savefig(over_steps)
    return [against, over_steps]


def _colour(arm: str, number: int) -> str:
    rule = arm.rpartition("-")[0] if arm not in COLOURS else arm
    return COLOURS.get(rule, SPARE[number % len(SPARE)])


def _against(
    axes: Any, results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], colours: Mapping[str, str]
) -> None:
    """A point a training: held-out loss over held-out max_vio, its two noise floors as lines; dense as a line."""
    for row in rows:
        found = [result for result in results if result["arm"] == row["arm"]]
        losses = [result["heldout_loss"] for result in found]
        if row["heldout_max_vio"] is None:
            axes.axhspan(min(losses), max(losses), color=colours[row["arm"]], alpha=0.15, linewidth=0)
            axes.axhline(float(np.median(losses)), color=colours[row["arm"]], linewidth=1, label=row["arm"])
            continue
        axes.plot(
            [result["heldout_max_vio"] for result in found], losses, "o", color=colours[row["arm"]], label=row["arm"]
        )
    sparse = [row for row in rows if row["heldout_floor"] is not None]
    if sparse:
        floors = (
            ("heldout_floor", "floor, independent tokens", "--"),
            ("heldout_document_floor", "floor, documents", ":"),
        )
        for key, label, style in floors:
            value = float(np.median([row[key].median for row in sparse]))
            axes.axvline(value, color=GREY, linewidth=1.2, linestyle=style, label=f"{label} {value:.3f}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Held-out loss against balance, a point a seed", loc="left", fontweight="bold")
    axes.set_xlabel("max_vio of the whole held-out set (0 is perfect)")
    axes.set_ylabel("held-out loss (nats per token)")
    _finish(axes)


def _over_steps(
    axes: Any, results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], colours: Mapping[str, str]
) -> None:
    """max_vio of each step: the seeds' mean, smoothed; the band is from the least to the greatest seed."""
    longest = 1
    for row in rows:
        if row["step_max_vio"] is None:
            continue
        series = [result["series"]["max_vio"] for result in results if result["arm"] == row["arm"]]
        steps = np.arange(1, len(series[0]) + 1)
        window = max(1, len(steps) // 40)
        smooth = np.stack([running_mean(np.array(one, dtype=np.float64), window) for one in series])
        axes.plot(steps, smooth.mean(axis=0), color=colours[row["arm"]], linewidth=1.6, label=row["arm"])
        axes.fill_between(
            steps, smooth.min(axis=0), smooth.max(axis=0), color=colours[row["arm"]], alpha=0.15, linewidth=0
        )
        longest = max(longest, len(steps))
    floors = {round(row["step_floor"].median, 3) for row in rows if row["step_floor"] is not None}
    for floor in sorted(floors):
        axes.axhline(floor, color=GREY, linewidth=1.2, linestyle="--", label=f"noise floor {floor:.3f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("max_vio of each step's batch", loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("max_vio = (max load - mean) / mean")
    axes.set_xlim(1, max(2, longest))
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
