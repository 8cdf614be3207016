"""The heat maps: each figure in its cell, colours that mean what they say, a picture for every size of model."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from launch.heatmap import DEAD, PAIRS, UNKNOWN, VIRIDIS, load_colours, load_image, pair_colours, pairs_image
from launch.tensorboard import png_bytes

COUNTS = np.array([[10, 0, 6, 8], [6, 6, 6, 6], [24, 0, 0, 0]])


def test_the_heat_map_shows_each_load_in_its_cell() -> None:
    image = load_image(COUNTS, ["layer 1", "layer 2", "mtp 0"])
    assert image.dtype == np.uint8 and image.shape[2] == 3
    decoded = np.asarray(Image.open(io.BytesIO(png_bytes(image))))
    assert np.array_equal(decoded, image)
    fair = tuple(load_colours(np.array([1.0]))[0].tolist())
    for colour in (DEAD, fair, tuple(bytes.fromhex(VIRIDIS[-1]))):
        assert (image == colour).all(axis=-1).sum() > 200  # cells large enough to see


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 16), (59, 256), (3, 1000)])
def test_the_heat_map_fits_every_model(shape: tuple[int, int]) -> None:
    height, width, _ = load_image(np.ones(shape, dtype=np.int64)).shape
    assert 70 <= height <= 1000 and 60 <= width <= 3200


def test_pairs_are_coloured_by_how_far_chance_is() -> None:
    dark, light = bytes.fromhex(PAIRS[0]), bytes.fromhex(PAIRS[-1])
    colours = pair_colours(np.array([0.0, 0.25, 1.0, 4.0, 9.0, math.nan]))
    expected = [dark, dark, bytes.fromhex(PAIRS[3]), light, light, bytes(UNKNOWN)]
    assert colours.tolist() == [list(colour) for colour in expected]
    either_side = pair_colours(np.array([0.5, 2.0])).astype(int)
    assert either_side[0, 2] > either_side[0, 0] and either_side[1, 0] > either_side[1, 2]  # blue, orange


@pytest.mark.parametrize("n_experts", [1, 2, 4, 16, 256, 600])
def test_the_picture_of_pairs_fits_every_model(n_experts: int) -> None:
    pairs = np.ones((n_experts, n_experts), dtype=np.int64) * 7
    height, width, _ = pairs_image(pairs).shape
    assert 60 <= height <= 1300 and 60 <= width <= 1400
    if n_experts == 16:
        cells = (pairs_image(pairs) == UNKNOWN).all(axis=-1).sum()
        assert cells >= 16 * 25 * 25  # the diagonal and nothing else
        assert cells < 17 * 28 * 28


def test_lighter_means_more_load() -> None:
    colours = load_colours(np.linspace(1e-6, 2.0, 50)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(colours) > 0).all()
