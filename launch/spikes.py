"""Tells a spike from noise: a value far above the median of the last ones, measured by their own spread."""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

_SIGMA = 1.4826  # times the median absolute deviation is the standard deviation of normally distributed values


def robust(values: Sequence[float]) -> tuple[float, float]:
    """Median and standard deviation as the median absolute deviation gives it: a tenth of wild values moves neither.

    Source: Hampel 1974, The influence curve and its role in robust estimation.
    """
    middle = median(values)
    return middle, _SIGMA * median(abs(value - middle) for value in values)


class Window:
    """The last values of one figure.

    Args:
        size: how many are kept; a quarter of them must be there before anything is judged.
        sigmas: how many standard deviations from the median are too far.
        least: what is never too far: this share of the median, for figures that hardly move.
    """

    def __init__(self, size: int, sigmas: float, least: float) -> None:
        self.sigmas, self.least = sigmas, least
        self._values: deque[float] = deque(maxlen=size)
        self._enough = max(8, size // 4)

    def bounds(self) -> tuple[float, float] | None:
        """Below and above which a value is out of the ordinary; None while there are too few to tell."""
        if len(self._values) < self._enough:
            return None
        middle, sigma = robust(self._values)
        reach = max(self.sigmas * sigma, self.least * abs(middle))
        return middle - reach, middle + reach

    def add(self, value: float) -> None:
        """Takes an ordinary value."""
        self._values.append(value)

    def clear(self) -> None:
        """Forgets: from now on another level is ordinary."""
        self._values.clear()

    def state(self) -> list[float]:
        """For a checkpoint; JSON keeps every bit."""
        return list(self._values)

    def load_state(self, state: Sequence[Any]) -> None:
        """Takes back what `state` gave; of another size, as many of the newest as fit."""
        self.clear()
        self._values.extend(map(float, state))
