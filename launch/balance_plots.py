"""The report's plots of the balance: loads, biases, what the bias changed, gate entropy, pairs of experts, ranks.

Lines of layers are coloured from the first (dark) to the last (light) in viridis, whose steps of lightness are even.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch import balance_stats
from launch.heatmap import DEAD, FULL_SCALE, PAIR_SCALE, VIRIDIS, load_colours, pair_colours, spread
from launch.plots import (
    BLUE,
    GREEN,
    GREY,
    MAX_PANELS,
    ORANGE,
    Marks,
    alarms_in_title,
    draw_marks,
    edges,
    layer_panels,
    legend_below,
    limits,
    marker,
    noisy_line,
    step_figure,
    whole_numbers,
)  # fmt: skip

# L layers, E routed experts, M steps that are drawn

Span = tuple[int, int, int]  # row of the layer, first and last step of an alarm


def save_balance(
    path: Path, steps: np.ndarray, max_vio: np.ndarray, per_rank: np.ndarray, floor: np.ndarray, marks: Marks
) -> None:
    """max_vio over experts and over expert-parallel ranks, with the noise floor that no router gets far below."""
    with step_figure(path, "Balance of the experts", "max_vio = (max load - mean) / mean", steps, marks) as axes:
        noisy_line(axes, steps, max_vio, BLUE, "busiest expert")
        if np.nanmax(per_rank, initial=0.0) > 0:
            noisy_line(axes, steps, per_rank, GREEN, "busiest rank")
        axes.plot(steps, floor, color=ORANGE, linewidth=1.5, linestyle="--", label="noise floor of the busiest expert",
                  marker=marker(steps))  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        legend_below(axes)


def save_balance_of_layers(
    path: Path,
    steps: np.ndarray,
    max_vio: np.ndarray,
    floor: np.ndarray,
    layer_names: Sequence[str],
    spans: Sequence[Span],
) -> None:
    """max_vio of each layer with the noise floor, one panel a layer, the steps under a max_vio alarm shaded.

    Args:
        steps: (M,) int, ascending. max_vio: (M, L). floor: (M,).
    """
    title = "Balance of each layer (dashed: noise floor of a fair choice" + ("; shaded: alarm)" if spans else ")")
    with layer_panels(path, title, "max_vio", steps, layer_names, sharey=True) as panels:
        for layer, axes in panels:
            noisy_line(axes, steps, max_vio[:, layer], BLUE, "busiest expert")
            axes.plot(steps, floor, color=ORANGE, linewidth=1.5, linestyle="--", marker=marker(steps))
            for row, first, last in spans:
                if row == layer:
                    axes.axvspan(max(first, steps[0]) - 0.5, min(last, steps[-1]) + 0.5, color=ORANGE, alpha=0.15, lw=0)
            axes.grid(alpha=0.25)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def save_by_layer(
    path: Path,
    title: str,
    y_label: str,
    steps: np.ndarray,
    values: np.ndarray,
    layer_names: Sequence[str],
    marks: Marks,
    bound: tuple[float, str] | None = None,
) -> None:
    """One figure of every layer in one picture, up to MAX_PANELS layers from the first to the last.

    Args:
        steps: (M,) int, ascending. values: (M, L), NaN where not measured.
        bound: a height that the figure cannot pass, and its name.
    """
    with step_figure(path, title, y_label, steps, marks) as axes:
        shown = spread(len(layer_names), MAX_PANELS)
        for layer, colour in zip(shown, _ladder(len(shown)), strict=True):
            noisy_line(axes, steps, values[:, layer], colour, layer_names[layer], window_in_label=False)
        axes.set_ylim(bottom=0)
        if bound is not None:
            axes.axhline(bound[0], color="black", linewidth=1, linestyle="--", label=bound[1])
            room = bound[0] - float(np.nanmin(values))
            axes.set_ylim(max(0.0, bound[0] - 1.2 * room), bound[0] + 0.1 * room)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def save_dead(path: Path, steps: np.ndarray, dead: np.ndarray, layer_names: Sequence[str], marks: Marks) -> None:
    """How many experts of each layer got no token, layers downwards, steps to the right.

    Args:
        steps: (M,) int, ascending. dead: (M, L) numbers of experts.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    most = max(1, int(np.nanmax(dead, initial=0)))
    shades = np.linspace(np.array(DEAD) / 255, (0.25, 0.1, 0.0), most)  # from one expert to the most
    colours = ListedColormap(np.concatenate([[[0.95, 0.95, 0.95]], shades]))
    norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
    with step_figure(path, "Experts without a token", "", steps, marks) as axes:
        axes.pcolormesh(edges(steps), np.arange(len(layer_names) + 1) - 0.5, dead.T, cmap=colours, norm=norm)
        rows = spread(len(layer_names), 16)
        axes.set_yticks(rows, [layer_names[row] for row in rows])
        axes.set_ylim(len(layer_names) - 0.5, -0.5)
        axes.grid(False)
        bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, ticks=spread(most + 1, 6))
        bar.set_label("experts")


def save_pairs(path: Path, step: int, pairs: np.ndarray, layer_names: Sequence[str]) -> None:
    """Which experts are chosen together, over what chance gives, one square a layer.

    Args:
        pairs: (L, E, E) int64, how often a token chose both experts.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    shown = spread(len(layer_names), MAX_PANELS)
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.4 + max(2.3 * columns, 3.6), 0.7 + 2.35 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(f"Experts chosen by the same token, step {step}", x=0.01, ha="left", fontweight="bold")
    for layer, axes in zip(shown, grid.flat, strict=False):
        axes.imshow(pair_colours(balance_stats.coactivation_lift(pairs[layer])), interpolation="nearest")
        axes.set_title(layer_names[layer], fontsize=9, loc="left")
        axes.set_xlabel("expert")
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("expert")
    levels = np.geomspace(1 / PAIR_SCALE, PAIR_SCALE, 256)
    scale = ScalarMappable(LogNorm(levels[0], levels[-1]), ListedColormap(pair_colours(levels) / 255))
    bar = figure.colorbar(scale, ax=list(grid.flat[: len(shown)]), extend="both", shrink=0.9, aspect=30, pad=0.02)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    bar.set_label("times as often as by chance")
    figure.savefig(path)


def save_ranks(
    path: Path, steps: np.ndarray, rank_vio: np.ndarray, waiting: np.ndarray, mib_sent: np.ndarray, marks: Marks
) -> None:
    """What sets the step time between ranks: the busiest rank's load, the waiting for it, and what went over the wire.

    Args:
        steps: (M,) int, ascending. rank_vio: (M,). waiting: (M,) % of step time. mib_sent: (M,) MiB a step, all ranks.
            Figures that were never measured are left out.
    """
    from matplotlib.figure import Figure

    rows = [
        ("busiest rank,\nmax_vio", rank_vio, GREEN),
        ("waiting,\n% of step time", waiting, BLUE),
        ("sent a step,\nMiB, all ranks", mib_sent, ORANGE),
    ]
    rows = [row for row in rows if np.isfinite(row[1]).any()]
    figure = Figure(figsize=(8, 0.8 + 1.7 * len(rows)), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    figure.suptitle("Balance of the ranks" + alarms_in_title(marks), x=0.01, ha="left", fontweight="bold")
    for number, (axes, (y_label, values, colour)) in enumerate(zip(grid, rows, strict=True)):
        axes.set_xlim(*limits(steps))
        noisy_line(axes, steps, values, colour, "")
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        whole_numbers(axes.xaxis)
        draw_marks(axes, marks, labelled=number == 0)
    grid[-1].set_xlabel("optimizer step")
    figure.savefig(path)


def save_load_heat_maps(path: Path, steps: np.ndarray, loads: np.ndarray, layer_names: Sequence[str]) -> None:
    """Loads over time, one panel a layer: experts upwards, steps to the right.

    Args:
        steps: (M,) int, ascending. loads: (M, L, E) int64.
    """
    ratio = np.stack([balance_stats.load_ratio(one) for one in loads])  # (M, L, E)
    with layer_panels(
        path, "Load of each expert over its layer's mean (orange: no token)", "expert", steps, layer_names
    ) as panels:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        for layer, axes in panels:
            picture = load_colours(ratio[:, layer].T)  # (E, M, 3)
            axes.pcolormesh(edges(steps), np.arange(ratio.shape[2] + 1) - 0.5, picture)
            whole_numbers(axes.yaxis)
        figure = axes.figure
        scale = ScalarMappable(Normalize(0, FULL_SCALE), ListedColormap(load_colours(np.linspace(1e-9, 2, 256)) / 255))
        bar = figure.colorbar(scale, ax=[axes for _, axes in panels], extend="max", shrink=0.9, aspect=30, pad=0.02)
        bar.set_label("load / mean load")


def save_bias(path: Path, steps: np.ndarray, bias: np.ndarray, layer_names: Sequence[str]) -> None:
    """Every expert's routing bias over time against the layer's median expert, one panel a layer, the highest and the
    lowest at the end named.

    Args:
        steps: (M,) int, ascending. bias: (M, L, E) fp32.
    """
    bias = balance_stats.against_the_median(bias)
    title = "Routing bias of each expert, against the layer's median"
    with layer_panels(path, title, "bias", steps, layer_names, sharey=True) as panels:
        for layer, axes in panels:
            axes.plot(steps, bias[:, layer], color=GREY, linewidth=0.7, alpha=0.5, marker=marker(steps))
            for expert, colour in ((np.argmax(bias[-1, layer]), ORANGE), (np.argmin(bias[-1, layer]), BLUE)):
                axes.plot(steps, bias[:, layer, expert], color=colour, linewidth=1.6, label=f"expert {expert}",
                          marker=marker(steps))  # fmt: skip
            axes.axhline(0, color="black", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderpad=0)


def _ladder(number: int) -> list[str]:
    """Colours for layers in order, from dark to light, leaving out the lightest, which is lost on white."""
    return [f"#{VIRIDIS[i]}" for i in spread(len(VIRIDIS) - 1, number)] if number > 1 else [BLUE]
