"""The report's plots with matplotlib: frames with a step axis, and the figures of training, speed and memory.

Colours are Okabe and Ito's (told apart by colour-blind readers). matplotlib is imported inside, and only by what draws;
its pyplot, with its global state, not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from launch.heatmap import spread

# M steps that are drawn

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
MAX_PANELS = 8

ALARM = "alarm"  # the label of marks that are drawn as triangles: there may be many
Marks = Sequence[tuple[int, str]]  # (step, what happened there), drawn as dotted lines


def save_loss(
    path: Path, steps: np.ndarray, loss: np.ndarray, mtp_loss: np.ndarray, heldout: np.ndarray, marks: Marks
) -> None:
    """Loss a step, thin, with its running mean; beside it multi-token prediction and held-out documents where known."""
    with step_figure(path, "Loss", "loss (nats per token)", steps, marks) as axes:
        noisy_line(axes, steps, loss, BLUE, "next token")
        if np.isfinite(mtp_loss).any():
            noisy_line(axes, steps, mtp_loss, ORANGE, "multi-token prediction", "--")
        known = np.isfinite(heldout)
        if known.any():
            axes.plot(steps[known], heldout[known], color=GREEN, linewidth=1.6, marker="o", markersize=4,
                      label="held-out documents", zorder=4)  # fmt: skip
        legend_below(axes)


def save_speed(path: Path, steps: np.ndarray, tokens_per_second: np.ndarray, marks: Marks) -> None:
    """Tokens per second over all ranks, with the median."""
    with step_figure(path, "Throughput", "tokens per second, all ranks", steps, marks) as axes:
        noisy_line(axes, steps, tokens_per_second, BLUE, "per step")
        median = float(np.nanmedian(tokens_per_second))
        axes.axhline(median, color=GREY, linewidth=1, linestyle="--", label=f"median {median:,.0f}")
        axes.set_ylim(bottom=0)
        legend_below(axes)


def save_time_shares(
    path: Path, steps: np.ndarray, step_seconds: np.ndarray, parts: Mapping[str, np.ndarray], marks: Marks
) -> None:
    """What share of each step's time went into waiting; the running means of up to two kinds of it."""
    with step_figure(path, "Time not spent computing", "% of step time", steps, marks) as axes:
        for (label, seconds), colour, style in zip(parts.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
            percent = np.divide(100.0 * seconds, step_seconds, out=np.zeros(len(steps)), where=step_seconds > 0)
            noisy_line(axes, steps, percent, colour, label, style)
        axes.set_ylim(bottom=0)
        legend_below(axes)


def save_memory(path: Path, steps: np.ndarray, memory_gib: np.ndarray, marks: Marks) -> None:
    """Memory of rank 0 over the run."""
    with step_figure(path, "Memory of rank 0", "GiB", steps, marks) as axes:
        axes.plot(steps, memory_gib, color=BLUE, linewidth=1.5, marker=marker(steps))
        axes.set_ylim(0, max(1.1 * float(np.nanmax(memory_gib)), 1e-3))


@contextmanager
def step_figure(path: Path, title: str, y_label: str, steps: np.ndarray, marks: Marks) -> Iterator[Any]:
    """Axes with the steps to the right; marks are drawn and the file is written when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title + alarms_in_title(marks), x=0.01, ha="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.set_xlim(*limits(steps))
    whole_numbers(axes.xaxis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    draw_marks(axes, marks)
    figure.savefig(path)


def alarms_in_title(marks: Marks) -> str:
    """What the title says of the triangles that ``draw_marks`` will draw."""
    return " (triangles: alarms)" if any(label == ALARM for _, label in marks) else ""


def legend_below(axes: Any) -> None:
    """The legend under the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def draw_marks(axes: Any, marks: Marks, labelled: bool = True) -> None:
    """Dotted lines at the marks, their labels above the axes; marks too near to the one before share its label."""
    low, high = axes.get_xlim()
    alarms = [step for step, label in marks if label == ALARM]
    if alarms:
        axes.plot(alarms, np.ones(len(alarms)), color=ORANGE, marker="v", markersize=6, linestyle="none", clip_on=False,
                  transform=axes.get_xaxis_transform(), zorder=5)  # fmt: skip
    labels: list[tuple[int, list[str]]] = []
    for step, label in marks:
        if label == ALARM:
            continue
        axes.axvline(step, color=GREY, linewidth=1, linestyle=":")
        if not labels or step - labels[-1][0] > 0.025 * (high - low):
            labels.append((step, []))
        if label not in labels[-1][1]:
            labels[-1][1].append(label)
    for step, texts in labels if labelled else []:
        axes.annotate(", ".join(texts), (step, 1.0), xycoords=("data", "axes fraction"), fontsize=8, color=GREY,
                      rotation=90, ha="center", va="bottom", xytext=(0, 6), textcoords="offset points")  # fmt: skip


@contextmanager
def layer_panels(
    path: Path, title: str, y_label: str, steps: np.ndarray, layer_names: Sequence[str], sharey: bool = False
) -> Iterator[list[tuple[int, Any]]]:
    """Axes for up to MAX_PANELS layers, evenly spread from the first to the last, as (row of the counts, axes)."""
    from matplotlib.figure import Figure

    shown = spread(len(layer_names), MAX_PANELS)
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(8.6, 0.8 + 1.9 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    shown_panels = list(zip(shown, grid.flat, strict=False))
    for layer, axes in shown_panels:
        axes.set_title(layer_names[layer], fontsize=9, loc="left")
        axes.set_ylabel(y_label)
        axes.set_xlim(*limits(steps))
        whole_numbers(axes.xaxis)
    for axes in grid.flat[len(shown_panels) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = [axes for i, (_, axes) in enumerate(shown_panels) if i % columns == column][-1]
        lowest.set_xlabel("optimizer step")
        lowest.tick_params(labelbottom=True)
    yield shown_panels
    figure.savefig(path)


def noisy_line(
    axes: Any,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str,
    style: str = "-",
    window_in_label: bool = True,
) -> None:
    """A figure a step; in long runs thin, with its running mean over it."""
    window = max(1, len(values) // 40)
    if window == 1:
        axes.plot(steps, values, color=colour, linewidth=1.6, linestyle=style, label=label, marker=marker(steps))
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.8, linestyle=style,
              label=f"{label}, mean of {window} steps" if window_in_label else label)  # fmt: skip


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the ``window`` values around each, fewer at the ends, leaving out those that are not finite."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(0, np.arange(len(values)) - (window - 1) // 2)
    end = np.minimum(len(values), np.arange(len(values)) + window // 2 + 1)
    number = counts[end] - counts[start]
    return np.divide(sums[end] - sums[start], number, out=np.full(len(values), np.nan), where=number > 0)


def whole_numbers(axis: Any) -> None:
    """Ticks at round whole numbers alone: steps and experts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def marker(steps: np.ndarray) -> str | None:
    """Points for runs of a step or two, which are no line."""
    return "o" if len(steps) < 3 else None


def limits(steps: np.ndarray) -> tuple[float, float]:
    """The first and the last step; a run of one step gets some room around it."""
    return (steps[0], steps[-1]) if steps[-1] > steps[0] else (steps[0] - 0.5, steps[-1] + 0.5)


def edges(steps: np.ndarray) -> np.ndarray:
    """Borders between the steps, (M + 1,), half-way to each neighbour."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middles[0] - steps[0])], middles, [2 * steps[-1] - middles[-1]]])
