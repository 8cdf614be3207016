"""Tile sizes of the grouped products: a short list to try, the fastest kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from kernels.measured import MeasuredCache, default_cache, may_measure, seconds


class Blocks(NamedTuple):
    """How a product is cut. `rows`, `wide`: the result's tile; `inner`: the piece of the summed dimension; `group`: how
    many row tiles walk over the columns together, so that they meet in the second cache; `waves`: programs for each
    processor of the GPU, each working through tiles in turn (0: one program a tile)."""

    rows: int
    wide: int
    inner: int
    group: int
    waves: int
    warps: int
    stages: int


# For the interpreter: small, since it computes tile by tile in numpy.
INTERPRETED = Blocks(32, 32, 32, 4, 0, 4, 1)
# In half precision on Hopper a 128 x 256 tile with 64 summed at a time feeds the tensor cores best; smaller tiles waste
# less where experts have few rows. In fp32 (exact, without tensor cores) tiles must be small for the registers.
HALF = (
    Blocks(128, 256, 64, 8, 1, 8, 3),
    Blocks(128, 256, 64, 8, 0, 8, 4),
    Blocks(128, 128, 64, 8, 2, 8, 4),
    Blocks(128, 128, 64, 8, 0, 4, 4),
    Blocks(64, 128, 64, 8, 0, 4, 4),
)
# Two sums at once (gate and up), or a heavy epilogue: half as wide, or registers spill.
HALF_PAIR = (
    Blocks(128, 128, 64, 8, 1, 8, 3),
    Blocks(128, 128, 64, 8, 0, 8, 4),
    Blocks(128, 64, 64, 8, 0, 4, 4),
    Blocks(64, 64, 64, 8, 0, 4, 4),
)
# The sum over rows of a weight's gradient: a gathered operand halves the depth of the load pipeline, so more stages.
HALF_OUTER = (
    Blocks(128, 256, 64, 8, 0, 8, 3),
    Blocks(128, 256, 64, 8, 0, 8, 5),
    Blocks(128, 128, 64, 8, 0, 8, 5),
    Blocks(128, 128, 32, 8, 0, 4, 5),
)
FULL = (Blocks(64, 64, 32, 8, 0, 4, 2), Blocks(32, 64, 32, 8, 0, 4, 2))


def blocks_for(
    op: str,
    key: tuple[object, ...],
    device: torch.device,
    candidates: Sequence[Blocks],
    launch: Callable[[Blocks], None],
    cache: MeasuredCache | None = None,
) -> Blocks:
    """The fastest cut of an operation for a shape class.

    Args:
        op, key: under which the answer is kept.
        device: on a CPU, that is in the interpreter, nothing is measured.
        candidates: cuts to try; the first is taken where nothing may be measured.
        launch: runs the kernel with a cut. It is run many times and so must only overwrite.
        cache: where answers are kept; None for the user's own.

    Raises:
        RuntimeError: no candidate runs on the device; with what the last one raised.
    """
    if device.type != "cuda":
        return INTERPRETED
    return measure_blocks(op, key, device, candidates, launch, cache or default_cache())


def measure_blocks(
    op: str,
    key: tuple[object, ...],
    device: torch.device,
    candidates: Sequence[Blocks],
    launch: Callable[[Blocks], None],
    cache: MeasuredCache,
) -> Blocks:
    """`blocks_for` on any device: the kept answer if it is still a candidate, or a new measurement."""
    kept = cache.get(device, op, key)
    if isinstance(kept, list) and tuple(kept) in candidates:
        return Blocks(*kept)
    if not may_measure(device):
        return candidates[0]
    times: dict[Blocks, float] = {}
    refused = ""
    for candidate in candidates:
        try:
            times[candidate] = seconds(lambda candidate=candidate: launch(candidate), device)  # type: ignore[misc]
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001 (more shared memory or registers than this GPU has, or no compiler)
            refused = f"{type(error).__name__}: {error}"
    if not times:
        raise RuntimeError(f"{op} {key}: none of {len(candidates)} tile sizes runs on {device}: {refused}")
    best = min(times, key=lambda candidate: times[candidate])
    cache.put(device, op, key, list(best))
    return best
