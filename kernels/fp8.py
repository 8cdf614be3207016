"""Rows in 8 bits: float8 e4m3fn with one scale for each row, and back."""

# R rows, D width

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from kernels.backend import Backend, resolve, size_class

# The largest finite number of e4m3fn.
FP8_MAX = 448.0


def quantize_rows(x: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude becomes 448, and round to float8 e4m3fn.

    Not differentiable: it packs what travels. A row of zeros has scale 1. A row with an infinity or a NaN has a NaN
    scale and so comes back as NaN, not as a plausible number.

    Args:
        x: (R, D), any float dtype.
        backend: `reference`, `triton` (a GPU, or Triton's interpreter), or `auto`.

    Returns:
        (R, D) float8_e4m3fn, (R,) fp32 scales: x is about values * scale. The relative error of a value is at most 2^-4
        down to 2^-6 of the scaled range; below, the absolute error is at most scale * 2^-10.
    """

    def run(name: str) -> tuple[Tensor, Tensor]:
        values, scales = quantize_rows(x, cast(Backend, name))
        return values.float(), scales

    if resolve("quantize_rows", backend, x, run, (size_class(x.shape[0]), x.shape[1])) == "triton":
        from kernels.fp8_triton import quantize

        return quantize(x)
    peak = x.detach().abs().amax(1).float() if x.shape[1] else x.new_ones(x.shape[0], dtype=torch.float32)
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    scale = torch.where(peak == 0, 1.0, peak / FP8_MAX)
    # A cast does not saturate: what rounding lifts over the largest number would become NaN.
    values = (x.detach().float() / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def dequantize_rows(
    values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, backend: Backend = "auto"
) -> Tensor:
    """values * scales, computed in fp32.

    Args:
        values: (R, D) float8_e4m3fn.
        scales: (R,) fp32.
        dtype: of the result.
        backend: as in `quantize_rows`.
    """

    def run(name: str) -> list[Tensor]:
        return [dequantize_rows(values, scales, dtype, cast(Backend, name))]

    if resolve("dequantize_rows", backend, scales, run, (size_class(values.shape[0]), values.shape[1], dtype)) == (
        "triton"
    ):
        from kernels.fp8_triton import dequantize

        return dequantize(values, scales, dtype)
    return values.float().mul_(scales[:, None]).to(dtype)
