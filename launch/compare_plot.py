"""Curves of several runs over each other: loss, held-out loss where it was measured, and balance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.config import ConfigError
from launch.history import read_history
from launch.plots import limits, running_mean, whole_numbers
from launch.runfolder import RunFolder, read_records

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def save_curves(path: Path, runs: Sequence[Path]) -> None:
    """Draws a PNG file with one panel for the loss and one for max_vio; running means, held-out losses as dots.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError([f"--plot needs matplotlib ({error}); install it with: pip install matplotlib"]) from error
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    loss_axes, balance_axes = figure.subplots(2, 1, sharex=True)
    drawn = []
    for number, run in enumerate(runs):
        history = read_history(RunFolder(run))
        if not len(history.steps):
            continue
        drawn.append(history.steps)
        colour, style = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
        window = max(1, len(history.steps) // 40)
        for axes, name in ((loss_axes, "loss"), (balance_axes, "max_vio")):
            values = history.figures[name]
            axes.plot(history.steps, values, color=colour, linewidth=0.6, alpha=0.25)
            axes.plot(history.steps, running_mean(values, window), color=colour, linestyle=style, label=str(run))
        figure_of = history.figures["heldout_loss"]
        measured = np.isfinite(figure_of)
        evaluated = dict(zip(history.steps[measured].tolist(), figure_of[measured].tolist(), strict=True))
        for event in read_records(RunFolder(run).events_path):
            if event["kind"] == "evaluation" and event.get("heldout_loss") is not None:
                evaluated[event["step"]] = event["heldout_loss"]
        if evaluated:
            at, losses = zip(*sorted(evaluated.items()), strict=True)
            loss_axes.plot(at, losses, color=colour, marker="o", linestyle=":", linewidth=1, clip_on=False)
    for axes, title in ((loss_axes, "loss, nats a token (dots: held-out)"), (balance_axes, "max_vio")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    balance_axes.set_yscale("log")
    for which in (balance_axes.yaxis.set_major_formatter, balance_axes.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    balance_axes.set_xlabel("optimizer step")
    whole_numbers(balance_axes.xaxis)
    if drawn:
        balance_axes.set_xlim(*limits(np.unique(np.concatenate(drawn))))
        handles, labels = loss_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(
            [f"--plot {path} cannot be written ({error}); name a file in a folder that exists"]
        ) from error
