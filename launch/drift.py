"""Tells slow changes of one figure: a creeping rise over hundreds of steps, and a sudden drop that lasts."""

from collections.abc import Mapping
from statistics import median
from typing import Any

_RISES = 3  # medians in a row, each above the one before
_LASTING = 8  # steps in a row


class Drift:
    """A figure that creeps up: the medians of blocks of steps rise one after the other.

    Args:
        block: steps of a block.
        least: by how much, as a share of the first of them, the medians must have risen together.
    """

    def __init__(self, block: int, least: float) -> None:
        self.block, self.least = block, least
        self._values: list[float] = []
        self._medians: list[float] = []  # the last _RISES + 1
        self.on = False

    def add(self, value: float) -> float | None:
        """Takes one step's value.

        Returns:
            At the end of a block at which the figure began or ceased to creep up (then `on` has changed): how many
            times the first of its medians the last one is. Else None.
        """
        self._values.append(value)
        if len(self._values) < self.block:
            return None
        self._medians = [*self._medians[-_RISES:], median(self._values)]
        self._values = []
        if len(self._medians) < 2:
            return None
        first, last = self._medians[0], self._medians[-1]
        ratio = last / first if first else 1.0
        rising = all(before < after for before, after in zip(self._medians, self._medians[1:], strict=False))
        if self.on:
            self.on = last >= self._medians[-2]
            return None if self.on else ratio
        self.on = rising and len(self._medians) == _RISES + 1 and ratio > 1 + self.least
        return ratio if self.on else None

    def begin(self) -> None:
        """Forgets all values: from now on another level is ordinary. A rise that was told of stays so until it ends."""
        self._values, self._medians = [], []

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"values": self._values, "medians": self._medians, "on": self.on}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave; nothing starts afresh."""
        self._values = list(map(float, state.get("values", ())))
        self._medians = list(map(float, state.get("medians", ())))
        self.on = bool(state.get("on", False))


class Drop:
    """A figure that falls out of its ordinary range at once and stays there, as when targets leak into the input."""

    def __init__(self) -> None:
        self.below = 0  # steps in a row

    def add(self, value: float, floor: float | None) -> bool | None:
        """Takes one step's value and the lower bound of the ordinary, None where that is not known.

        Returns:
            True when it has just been long enough, False when that has just ended, else None.
        """
        before = self.below
        self.below = self.below + 1 if floor is not None and value < floor else 0
        if self.below == _LASTING:
            return True
        return False if before >= _LASTING and not self.below else None
