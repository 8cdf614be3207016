"""Ranks that need more time of their own than the others: a pure rule over what each rank needed in each phase."""

# R ranks, P phases, W steps of the window

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.phases import PHASES

END_SHARE = 0.8  # of the limit's excess: below it a spell ends, so that a rank at the limit does not come and go
LOAD_SHARE = 0.5  # of a rank's excess that its experts' load must be able to explain, to be called the reason


@dataclass(frozen=True)
class Straggler:
    """A rank that has become slow, or no longer is.

    ratio: its own time over the middle rank's, the median of the window. phase: where most of its excess is.
    seconds: its excess a step. load_ratio: tokens that its experts got over the mean of ranks, None without experts
    that are spread. since: the step of the alarm.
    """

    rank: int
    host: str
    ratio: float
    limit: float
    phase: str
    seconds: float
    load_ratio: float | None
    since: int
    ended: bool

    @property
    def by_load(self) -> bool:
        """Whether the rank has more work, rather than being slow at the same work."""
        in_model = self.phase in ("forward", "backward")
        return in_model and self.load_ratio is not None and self.load_ratio - 1 >= LOAD_SHARE * (self.ratio - 1)

    def fields(self) -> dict[str, Any]:
        """Of the event, with its cause."""
        cause = f"rank {self.rank} on {self.host} needs {self.ratio:.2f} times the own time of the middle rank"
        if self.ended:
            cause = f"ended: {cause}"
        else:
            cause += f", most of the excess in {self.phase}"
            if self.by_load:
                cause += f"; its experts get {self.load_ratio:.2f} times the mean of tokens"
        return {
            "cause": cause, "rank": self.rank, "host": self.host, "ratio": round(self.ratio, 4), "limit": self.limit,
            "phase": self.phase, "seconds_more": round(self.seconds, 4),
            "load_ratio": None if self.load_ratio is None else round(self.load_ratio, 4),
            "reason": "expert load" if self.by_load else "slow", "since": self.since, "ended": self.ended,
        }  # fmt: skip


class Stragglers:
    """Compares ranks over a window of steps; on rank 0 alone.

    A step's middle is the median of all ranks' own times, of an even number the lower one: with two ranks the faster. A
    rank is slow when the median over the window of its time over the middle is above the limit, so that neither one
    slow step nor changing ones make an alarm. The spell ends below 1 + END_SHARE * (limit - 1).

    Args:
        limit: more than 1. window: steps. hosts: (R,) where each rank runs.
    """

    def __init__(self, limit: float, window: int, hosts: Sequence[str]) -> None:
        self.limit, self.hosts = limit, list(hosts)
        self._own: deque[np.ndarray] = deque(maxlen=window)  # (R, P)
        self._ratios: deque[np.ndarray] = deque(maxlen=window)  # (R,)
        self._loads: deque[np.ndarray] = deque(maxlen=window)  # (G,)
        self._since: dict[int, int] = {}  # of the slow ranks
        self.slowest: tuple[int, float] | None = None  # rank and ratio, over the window so far

    def judge(self, step: int, own: np.ndarray, loads: np.ndarray | None = None) -> list[Straggler]:
        """Takes one step's own times and returns what has changed.

        Args:
            step: 1-based. own: (R, P) seconds. loads: (G,) tokens that came to each expert-parallel rank, summed over
                layers; rank r of the world is r % G of them. None or G = 1: experts are not spread.
        """
        totals = own.sum(axis=1)  # (R,)
        middle = np.partition(totals, (len(totals) - 1) // 2)[(len(totals) - 1) // 2]
        self._own.append(own)
        self._ratios.append(totals / middle if middle > 0 else np.ones(len(totals)))
        if loads is not None and len(loads) > 1:
            self._loads.append(loads)
        ratios = np.median(np.array(self._ratios), axis=0)  # (R,)
        worst = int(ratios.argmax())
        self.slowest = (worst, float(ratios[worst]))
        if len(self._ratios) < (self._ratios.maxlen or 1):
            return []
        slow = [rank for rank in np.flatnonzero(ratios > self.limit).tolist() if rank not in self._since]
        over = [rank for rank in self._since if ratios[rank] < 1 + END_SHARE * (self.limit - 1)]
        self._since |= dict.fromkeys(slow, step)
        found = [self._told(rank, float(ratios[rank]), ended=False) for rank in slow]
        found += [self._told(rank, float(ratios[rank]), ended=True) for rank in over]
        for rank in over:
            del self._since[rank]
        return found

    def _told(self, rank: int, ratio: float, ended: bool) -> Straggler:
        own = np.array(self._own)  # (W, R, P)
        place = (own.shape[1] - 1) // 2
        excess = np.median(own[:, rank] - np.partition(own, place, axis=1)[:, place], axis=0)  # (P,)
        totals = own.sum(axis=2)
        seconds = float(np.median(totals[:, rank] - np.partition(totals, place, axis=1)[:, place]))
        load_ratio = None
        if self._loads:
            loads = np.array(self._loads, dtype=np.float64).sum(axis=0)  # (G,)
            load_ratio = float(loads[rank % len(loads)] / max(1.0, loads.mean()))
        return Straggler(
            rank, self.hosts[rank], ratio, self.limit, PHASES[int(excess.argmax())], seconds, load_ratio,
            self._since[rank], ended,
        )  # fmt: skip
