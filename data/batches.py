"""Which order numbers make up a step's global batch: batch sizes that change at given steps, ranges left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.errors import DataError


class Phase(NamedTuple):
    """From `step` on, global batches have `size` sequences; the first one starts at position `position`."""

    step: int
    position: int
    size: int


@dataclass(frozen=True)
class Batches:
    """The sizes and places of all global batches.

    Positions count the sequences that are read; order numbers also count the skipped ones.

    Attributes:
        phases: at least one, the first at position 0 and step `begins`, steps rising.
        skip_ranges: ranges (start, stop) of order numbers that are never read, rising and apart.
        begins: the first step, 0 but where the steps before followed another order of the data.
    """

    phases: tuple[Phase, ...]
    skip_ranges: tuple[tuple[int, int], ...] = ()
    begins: int = 0

    def __post_init__(self) -> None:
        if not self.phases or self.phases[0][:2] != (self.begins, 0) or any(phase.size < 1 for phase in self.phases):
            raise DataError(
                f"batch phases {self.phases} must start at step {self.begins}, position 0, with at least one "
                "sequence a step"
            )
        for before, after in zip(self.phases, self.phases[1:], strict=False):
            end = before.position + (after.step - before.step) * before.size
            if after.step <= before.step or after.position != end:
                raise DataError(
                    f"batch phase {after} does not follow {before}; it must begin where that ends, at {end}"
                )
        edges = [edge for skipped in self.skip_ranges for edge in skipped]
        if any(stop <= start for start, stop in self.skip_ranges) or edges != sorted(edges) or (edges and edges[0] < 0):
            raise DataError(f"skip ranges {self.skip_ranges} must be rising, apart and not empty")

    @classmethod
    def constant(cls, global_batch_size: int) -> Batches:
        """The same size throughout."""
        return cls((Phase(0, 0, global_batch_size),))

    @classmethod
    def beginning(cls, step: int, global_batch_size: int) -> Batches:
        """An order that begins at its first number with `step`, since the steps before it followed another order."""
        return cls((Phase(step, 0, global_batch_size),), begins=step)

    def then(self, step: int, global_batch_size: int) -> Batches:
        """The same batches before `step`, and another size from it on."""
        kept = tuple(phase for phase in self.phases if phase.step < step)
        if not kept:
            return Batches((Phase(self.begins, 0, global_batch_size),), self.skip_ranges, self.begins)
        return Batches((*kept, Phase(step, self.position(step), global_batch_size)), self.skip_ranges, self.begins)

    def skipping(self, step: int, n_steps: int = 1) -> Batches:
        """The same batches without the sequences of `n_steps` steps from `step` on; what follows moves up."""
        numbers = self.numbers(step, self.position(step + n_steps) - self.position(step))
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        added = [*self.skip_ranges, *((int(run[0]), int(run[-1]) + 1) for run in runs)]
        merged: list[tuple[int, int]] = []
        for first, stop in sorted(added):
            if merged and first == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((first, stop))
        return Batches(self.phases, tuple(merged), self.begins)

    def size(self, step: int) -> int:
        """Sequences in the global batch of a step."""
        return self._phase(step).size

    def position(self, step: int) -> int:
        """Sequences read before a step."""
        phase = self._phase(step)
        return phase.position + (step - phase.step) * phase.size

    def numbers(self, step: int, n: int | None = None) -> np.ndarray:
        """Order numbers (size,) int64 of a step's global batch, rising; `n` of them if given."""
        first = self.position(step)
        numbers = np.arange(first, first + (self.size(step) if n is None else n), dtype=np.int64)
        for start, stop in self.skip_ranges:
            numbers[numbers >= start] += stop - start
        return numbers

    def _phase(self, step: int) -> Phase:
        if step < 0:
            raise DataError(f"step {step} is negative; steps count from 0")
        if step < self.begins:
            raise DataError(f"step {step} is not of this order of the data, which begins at step {self.begins}")
        return max((phase for phase in self.phases if phase.step <= step), key=lambda phase: phase.step)
