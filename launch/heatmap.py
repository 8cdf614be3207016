"""Heat maps as plain RGB arrays, for TensorBoard: each expert's load, and which experts are chosen together.

Loads are drawn in viridis (even steps of lightness), pairs of experts between two of Okabe and Ito's colours, so that
colour-blind readers can tell them apart. numpy alone is needed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launch import balance_stats

# L layers, E routed experts

VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6dcd59", "b4de2c", "fde725")
DEAD = (0xD5, 0x5E, 0x00)  # an expert without a token: no colour of viridis
FULL_SCALE = 2.0  # loads are drawn from 0 to twice the fair share; more is drawn as twice
PAIRS = ("00446b", "0072b2", "7fb8d8", "f5f5f5", "eba96f", "d55e00", "803800")  # rarer than by chance ... more often
PAIR_SCALE = 4.0  # pairs are drawn from a quarter of what chance gives to four times
UNKNOWN = (0xBD, 0xBD, 0xBD)  # an expert with itself, or one without a token
GLYPHS = {  # 3 x 5 pixels; an octal digit a row
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71122",
    "8": "75757", "9": "75717", "m": "57755", "x": "05250", "/": "11244",
}  # fmt: skip
GLYPH_SCALE = 2  # image pixels per glyph pixel


def load_colours(ratio: np.ndarray) -> np.ndarray:
    """Colours for loads over the fair share, of any shape: (..., 3) uint8; an expert without a token stands out."""
    colours = _blend(np.nan_to_num(ratio) / FULL_SCALE, VIRIDIS)
    colours[ratio == 0] = DEAD
    return colours


def pair_colours(lift: np.ndarray) -> np.ndarray:
    """Colours for ``balance_stats.coactivation_lift``, of any shape: (..., 3) uint8; grey where it is NaN.

    Near white is what chance gives, orange more often, blue more rarely; each step of lightness is the same factor.
    """
    known = np.where(np.isnan(lift), 1.0, np.maximum(lift, 1e-9))
    colours = _blend(0.5 + 0.5 * np.log(known) / np.log(PAIR_SCALE), PAIRS)
    colours[np.isnan(lift)] = UNKNOWN
    return colours


def _blend(position: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Colours for positions from 0 (the first) to 1 (the last): (..., 3) uint8."""
    table = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in colours], dtype=np.float64)
    position = np.clip(position, 0.0, 1.0) * (len(table) - 1)
    channels = [np.interp(position, np.arange(len(table)), table[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


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
    levels = load_colours(np.linspace(FULL_SCALE, 1e-9, 256))
    return _framed(load_colours(ratio), height, width, dict(enumerate(names)), levels, ("2x", "1x", "0x"))


def pairs_image(pairs: Any) -> np.ndarray:
    """How often experts are chosen together over what chance gives, as an RGB picture, (height, width, 3) uint8.

    Row and column numbers are experts; the strip on the right is the scale, from a quarter to four times, and beyond.

    Args:
        pairs: (E, E) int64, one layer's counts: how often a token chose both (diagonal: tokens of the expert).
    """
    colours = pair_colours(balance_stats.coactivation_lift(pairs))
    n_experts = colours.shape[0]
    cell = int(np.clip(512 // n_experts, 2, 28))
    every = _label_every(n_experts, cell, 5 * GLYPH_SCALE + 4)
    rows = {expert: str(expert) for expert in range(0, n_experts, every)}
    levels = pair_colours(np.geomspace(PAIR_SCALE, 1 / PAIR_SCALE, 256))
    return _framed(colours, cell, cell, rows, levels, ("4x", "1x", "1/4x"))


def _framed(
    colours: np.ndarray, height: int, width: int, rows: dict[int, str], levels: np.ndarray, scale: Sequence[str]
) -> np.ndarray:
    """Cells of ``height`` x ``width`` pixels with labelled rows, numbered columns, and a scale from top to bottom."""
    n_experts = colours.shape[1]
    cells = colours.repeat(height, axis=0).repeat(width, axis=1)
    if width >= 8:
        cells[:, width - 1 :: width] = 255
    if height >= 8:
        cells[height - 1 :: height] = 255
    left = 8 + max(text_width(name) for name in rows.values())
    top, bottom, right = 8, 22, 40 + max(text_width(label) for label in scale)
    tall = max(cells.shape[0] - 1, 48)  # room for the scale
    image = np.full((tall + 1 + top + bottom, cells.shape[1] + left + right, 3), 255, dtype=np.uint8)
    image[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    for row, name in rows.items():
        _write(image, name, max(0, top + row * height + (height - 5 * GLYPH_SCALE) // 2), left - 4 - text_width(name))
    for expert in range(0, n_experts, _label_every(n_experts, width, text_width(str(n_experts)) + 6)):
        label = str(expert)
        _write(image, label, top + cells.shape[0] + 6, left + expert * width + max(0, width - text_width(label)) // 2)
    bar = slice(left + cells.shape[1] + 12, left + cells.shape[1] + 24)
    image[top : top + tall, bar] = levels[np.linspace(0, len(levels) - 1, tall).round().astype(int), None]
    for label, row in zip(scale, (0, (tall - 10) // 2, tall - 10), strict=True):
        _write(image, label, top + row, bar.stop + 4)
    return image


def _label_every(number: int, cell: int, room: int) -> int:
    """Which cells get a label: every n-th, so that each label has so many pixels of room."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, number) if n * cell >= room or n >= number)


def spread(number: int, at_most: int) -> list[int]:
    """Up to ``at_most`` of the numbers 0 .. number - 1, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, number - 1, min(at_most, number)).round().astype(int)).tolist()


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
