"""From logits to tokens: temperature, top-k, top-p, and one row's random draws."""

# B rows, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: only so many most likely tokens may be drawn; 0 for all.
        top_p: only the fewest most likely tokens whose probabilities, after temperature and top-k, reach this sum may
            be drawn (Holtzman et al. 2020, arXiv 1904.09751); 1 for all. At least one always may.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def problems(self) -> list[str]:
        """Every violated rule."""
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(
                f"temperature = {self.temperature} is not a number of at least 0; use 0 for the most likely token"
            )
        if self.top_k < 0:
            found.append(f"top_k = {self.top_k} is negative; use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p = {self.top_p} is not above 0 and at most 1; use 1 for all tokens")
        return found


def distributions(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the next token.

    Args:
        logits: (..., V), any float dtype and device.

    Returns:
        (..., V) float64 on the CPU, each row's sum 1; with temperature 0 all of it on the first greatest logit.
    """
    wide = logits.detach().to("cpu", torch.float64)
    if sampling.greedy:
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
    # The greatest is taken off before the division: a tiny temperature then gives minus infinity and not a NaN.
    wide = (wide - wide.amax(-1, keepdim=True)) / sampling.temperature
    narrow_k, narrow_p = 0 < sampling.top_k < wide.shape[-1], sampling.top_p < 1
    if not narrow_k and not narrow_p:
        return wide.softmax(-1)
    ordered, index = wide.sort(dim=-1, descending=True, stable=True)  # equals stay in the order of token numbers
    if narrow_k:
        ordered[..., sampling.top_k :] = float("-inf")
    probabilities = ordered.softmax(-1)
    if narrow_p:
        before = probabilities.cumsum(-1) - probabilities
        before[..., 0] = 0.0
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(wide).scatter_(-1, index, probabilities)


class Draws(Protocol):
    """The random decisions of one row."""

    def pick(self, probabilities: Tensor) -> int:
        """A token from probabilities (V,) float64 that sum to 1."""
        ...

    def happens(self, probability: float) -> bool:
        """True with this probability, in [0, 1]."""
        ...


class SeededDraws:
    """Draws from a generator of the row's own, so that no other row of a batch changes them.

    A decision that is certain takes no number.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def _uniform(self) -> float:
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def pick(self, probabilities: Tensor) -> int:
        """By the inverse of the cumulative sum."""
        sums = probabilities.cumsum(-1)
        # right: a number on a border belongs to the token behind it, so that a token of probability 0 is never met.
        token = int(torch.searchsorted(sums, sums[-1] * self._uniform(), right=True))
        return token if token < len(sums) else int(probabilities.nonzero()[-1])  # rounding of the product upwards

    def happens(self, probability: float) -> bool:
        return probability >= 1 or (probability > 0 and self._uniform() < probability)
