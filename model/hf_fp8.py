"""Weights in 8 bits with one scale for each block, as DeepSeek-V3 is published, back to fp32."""

# R rows, C columns, a, b the block's height and width

from __future__ import annotations

from torch import Tensor

SCALE_SUFFIX = "_scale_inv"  # behind the weight's name; despite it the scale is multiplied


def dequantise(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """values * scales, each scale over its block; blocks at the right and lower border are cut off.

    Args:
        values: (R, C) of an 8-bit float type; R need not be a multiple of a, but the first row starts a block.
        scales: (ceil(R / a), ceil(C / b)).
        block: a, b.

    Returns:
        (R, C) fp32.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3.2: tiles of 128 x 128 for weights.
    """
    rows, columns = values.shape
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float() * spread


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight (..., R, C): (..., ceil(R / a), ceil(C / b))."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
