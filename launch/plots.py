"""Pictures of a run: the load heat map as a plain array for TensorBoard, and the report's plots with matplotlib.

Colours are Okabe and Ito's (told apart by colour-blind readers) for lines, and viridis (even steps of lightness) for
loads. matplotlib is imported inside, and only by ``save_*``; its pyplot, with its global state, not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from launch import balance_stats

# L layers, E routed experts, M steps that are drawn

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6dcd59", "b4de2c", "fde725")
DEAD = (0xD5, 0x5E, 0x00)  # an expert without a token: no colour of viridis
FULL_SCALE = 2.0  # loads are drawn from 0 to twice the fair share; more is drawn as twice
GLYPHS = {  # 3 x 5 pixels; an octal digit a row
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71122",
    "8": "75757", "9": "75717", "m": "57755", "x": "05250",
}  # fmt: skip
GLYPH_SCALE = 2  # image pixels per glyph pixel
MAX_PANELS = 8

Marks = Sequence[tuple[int, str]]  # (step, what happened there), drawn as dotted lines


def load_colours(ratio: np.ndarray) -> np.ndarray:
    """Colours for loads over the fair share, of any shape: (..., 3) uint8; an expert without a token stands out."""
    table = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in VIRIDIS], dtype=np.float64)
    position = np.clip(np.nan_to_num(ratio) / FULL_SCALE, 0.0, 1.0) * (len(table) - 1)
    channels = [np.interp(position, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[ratio == 0] = DEAD
    return colours


def load_image(counts: Any, layer_names: Sequence[str] | None = None) -> np.ndarray:
    """One step's loads as an RGB picture, (height, width, 3) uint8: layers downwards, experts to the right.

    Row and column numbers are layers and experts; the strip on the right is the scale, from no load to twice the fair
    share and more. Orange is an expert without a token.

    Args:
        counts: (L, E) int64, L and E at least 1.
        layer_names: L names, as ``balance_stats.layer_names`` gives them; None numbers the rows from 0.
    """
    ratio = balance_stats.load_ratio(counts)
    n_layers, n_experts = ratio.shape
    names = [str(i) for i in range(n_layers)] if layer_names is None else [_short(name) for name in layer_names]
    width = int(np.clip(800 // n_experts, 3, 28))
    height = int(np.clip(600 // n_layers, max(12, 48 // n_layers), max(28, 48 // n_layers)))
    cells = load_colours(ratio).repeat(height, axis=0).repeat(width, axis=1)
    if width >= 8:
        cells[:, width - 1 :: width] = 255
    cells[height - 1 :: height] = 255
    left = 8 + max(text_width(name) for name in names)
    top, bottom, right = 8, 22, 56
    image = np.full((cells.shape[0] + top + bottom, cells.shape[1] + left + right, 3), 255, dtype=np.uint8)
    image[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    for i, name in enumerate(names):
        _write(image, name, top + i * height + (height - 5 * GLYPH_SCALE) // 2, left - 4 - text_width(name))
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, n_experts) if n * width >= text_width(str(n_experts)) + 6)
    for expert in range(0, n_experts, every):
        label = str(expert)
        _write(image, label, top + cells.shape[0] + 6, left + expert * width + max(0, width - text_width(label)) // 2)
    bar = slice(left + cells.shape[1] + 12, left + cells.shape[1] + 24)
    levels = np.linspace(FULL_SCALE, 1e-9, max(cells.shape[0] - 1, 30))
    image[top : top + len(levels), bar] = load_colours(levels)[: image.shape[0] - top, None]
    for label, row in (("2x", 0), ("1x", (len(levels) - 10) // 2), ("0x", len(levels) - 10)):
        _write(image, label, top + row, bar.stop + 4)
    return image


def text_width(text: str) -> int:
    """Pixels that ``text`` takes in the heat map."""
    return len(text) * 4 * GLYPH_SCALE


def _write(image: np.ndarray, text: str, top: int, left: int) -> None:
    for i, letter in enumerate(text):
        rows = [[int(bit) for bit in f"{int(row, 8):03b}"] for row in GLYPHS[letter]]
        ink = np.array(rows, dtype=bool).repeat(GLYPH_SCALE, axis=0).repeat(GLYPH_SCALE, axis=1)
        at = image[top : top + ink.shape[0], left + i * 4 * GLYPH_SCALE :][:, : ink.shape[1]]
        at[ink[: at.shape[0], : at.shape[1]]] = 40


def _short(name: str) -> str:
    return name.replace("layer ", "").replace("moe ", "").replace("mtp ", "m")


def save_loss(path: Path, steps: np.ndarray, loss: np.ndarray, mtp_loss: np.ndarray, marks: Marks) -> None:
    """Loss a step, thin, with its running mean; the multi-token prediction loss beside it where there is one."""
    with _figure(path, "Loss", "loss (nats per token)", steps, marks) as axes:
        _noisy_line(axes, steps, loss, BLUE, "next token")
        if np.isfinite(mtp_loss).any():
            _noisy_line(axes, steps, mtp_loss, ORANGE, "multi-token prediction", "--")
        axes.legend(frameon=False)


def save_speed(path: Path, steps: np.ndarray, tokens_per_second: np.ndarray, marks: Marks) -> None:
    """Tokens per second over all ranks, with the median."""
    with _figure(path, "Throughput", "tokens per second, all ranks", steps, marks) as axes:
        _noisy_line(axes, steps, tokens_per_second, BLUE, "per step")
        median = float(np.nanmedian(tokens_per_second))
        axes.axhline(median, color=GREY, linewidth=1, linestyle="--", label=f"median {median:,.0f}")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def save_balance(
    path: Path, steps: np.ndarray, max_vio: np.ndarray, per_rank: np.ndarray, floor: np.ndarray, marks: Marks
) -> None:
    """max_vio over experts and over expert-parallel ranks, with the noise floor that no router gets far below."""
    with _figure(path, "Balance of the experts", "max_vio = (max load - mean) / mean", steps, marks) as axes:
        _noisy_line(axes, steps, max_vio, BLUE, "busiest expert")
        if np.nanmax(per_rank, initial=0.0) > 0:
            _noisy_line(axes, steps, per_rank, GREEN, "busiest rank")
        axes.plot(steps, floor, color=ORANGE, linewidth=1.5, linestyle="--", label="noise floor of a fair choice",
                  marker=_marker(steps))  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False)


def save_time_shares(
    path: Path, steps: np.ndarray, step_seconds: np.ndarray, parts: Mapping[str, np.ndarray], marks: Marks
) -> None:
    """What share of each step's time went into waiting; the running means of up to two kinds of it."""
    with _figure(path, "Time not spent computing", "% of step time", steps, marks) as axes:
        for (label, seconds), colour, style in zip(parts.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
            percent = np.divide(100.0 * seconds, step_seconds, out=np.zeros(len(steps)), where=step_seconds > 0)
            _noisy_line(axes, steps, percent, colour, label, style)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def save_memory(path: Path, steps: np.ndarray, memory_gib: np.ndarray, marks: Marks) -> None:
    """Memory of rank 0 over the run."""
    with _figure(path, "Memory of rank 0", "GiB", steps, marks) as axes:
        axes.plot(steps, memory_gib, color=BLUE, linewidth=1.5, marker=_marker(steps))
        axes.set_ylim(0, max(1.1 * float(np.nanmax(memory_gib)), 1e-3))


def save_load_heat_maps(path: Path, steps: np.ndarray, loads: np.ndarray, layer_names: Sequence[str]) -> None:
    """Loads over time, one panel a layer: experts upwards, steps to the right.

    Args:
        steps: (M,) int, ascending. loads: (M, L, E) int64.
    """
    ratio = np.stack([balance_stats.load_ratio(one) for one in loads])  # (M, L, E)
    with _panels(
        path, "Load of each expert over its layer's mean (orange: no token)", "expert", steps, layer_names
    ) as panels:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        for layer, axes in panels:
            picture = load_colours(ratio[:, layer].T)  # (E, M, 3)
            axes.pcolormesh(_edges(steps), np.arange(ratio.shape[2] + 1) - 0.5, picture)
            _whole_numbers(axes.yaxis)
        figure = axes.figure
        scale = ScalarMappable(Normalize(0, FULL_SCALE), ListedColormap(load_colours(np.linspace(1e-9, 2, 256)) / 255))
        bar = figure.colorbar(scale, ax=[axes for _, axes in panels], extend="max", shrink=0.9, aspect=30, pad=0.02)
        bar.set_label("load / mean load")


def save_bias(path: Path, steps: np.ndarray, bias: np.ndarray, layer_names: Sequence[str]) -> None:
    """Every expert's routing bias over time, one panel a layer, the highest and the lowest at the end named.

    Args:
        steps: (M,) int, ascending. bias: (M, L, E) fp32.
    """
    with _panels(path, "Routing bias of each expert", "bias", steps, layer_names, sharey=True) as panels:
        for layer, axes in panels:
            axes.plot(steps, bias[:, layer], color=GREY, linewidth=0.7, alpha=0.5, marker=_marker(steps))
            for expert, colour in ((np.argmax(bias[-1, layer]), ORANGE), (np.argmin(bias[-1, layer]), BLUE)):
                axes.plot(steps, bias[:, layer, expert], color=colour, linewidth=1.6, label=f"expert {expert}",
                          marker=_marker(steps))  # fmt: skip
            axes.axhline(0, color="black", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, borderpad=0)


@contextmanager
def _figure(path: Path, title: str, y_label: str, steps: np.ndarray, marks: Marks) -> Iterator[Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.set_xlim(*_limits(steps))
    _whole_numbers(axes.xaxis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    for step, label in marks:
        axes.axvline(step, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(label, (step, 1.0), xycoords=("data", "axes fraction"), fontsize=8, color=GREY, rotation=90,
                      ha="right", va="top", xytext=(-2, -2), textcoords="offset points")  # fmt: skip
    figure.savefig(path)


@contextmanager
def _panels(
    path: Path, title: str, y_label: str, steps: np.ndarray, layer_names: Sequence[str], sharey: bool = False
) -> Iterator[list[tuple[int, Any]]]:
    """Axes for up to MAX_PANELS layers, evenly spread from the first to the last, as (row of the counts, axes)."""
    from matplotlib.figure import Figure

    shown = np.unique(np.linspace(0, len(layer_names) - 1, min(MAX_PANELS, len(layer_names))).round().astype(int))
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(8.6, 0.8 + 1.9 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    panels = list(zip(shown.tolist(), grid.flat, strict=False))
    for layer, axes in panels:
        axes.set_title(layer_names[layer], fontsize=9, loc="left")
        axes.set_ylabel(y_label)
        axes.set_xlim(*_limits(steps))
        _whole_numbers(axes.xaxis)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for column in range(columns):
        lowest = [axes for i, (_, axes) in enumerate(panels) if i % columns == column][-1]
        lowest.set_xlabel("optimizer step")
        lowest.tick_params(labelbottom=True)
    yield panels
    figure.savefig(path)


def _noisy_line(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    window = max(1, len(values) // 40)
    if window == 1:
        axes.plot(steps, values, color=colour, linewidth=1.6, linestyle=style, label=label, marker=_marker(steps))
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.8, linestyle=style,
              label=f"{label}, mean of {window} steps")  # fmt: skip


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the ``window`` values around each, fewer at the ends, leaving out those that are not finite."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(0, np.arange(len(values)) - (window - 1) // 2)
    end = np.minimum(len(values), np.arange(len(values)) + window // 2 + 1)
    number = counts[end] - counts[start]
    return np.divide(sums[end] - sums[start], number, out=np.full(len(values), np.nan), where=number > 0)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) < 3 else None


def _limits(steps: np.ndarray) -> tuple[float, float]:
    """The first and the last step; a run of one step gets some room around it."""
    return (steps[0], steps[-1]) if steps[-1] > steps[0] else (steps[0] - 0.5, steps[-1] + 0.5)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders between the steps, (M + 1,), half-way to each neighbour."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middles[0] - steps[0])], middles, [2 * steps[-1] - middles[-1]]])
