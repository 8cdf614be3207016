"""A rank's own time in each phase of a step: its time less what it stood still waiting for other ranks.

On a CPU the clock is the process', on a GPU it is the stream's: marks are events in it, and reading them waits for
nothing that the step's sums do not wait for anyway.
"""

import time
from collections.abc import Sequence

import torch

from parallel.collective_waits import Waits
from parallel.communicator import Traffic

PHASES = ("data", "forward", "backward", "optimizer")
_PHASE_OF_SECTION = {"data": 0, "forward": 1, "backward": 2, "optimizer": 3, "step": 3}


class PhaseClock:
    """Times the phases of one rank. What is in none of them (saving, waiting for agreement) is not counted.

    Args:
        exchange: counts the all-to-all. reductions: count the rank's own all-reduces on a CPU.
        waits: of DeepSpeed's collectives on a CPU. device: where this rank computes. on: else every call does nothing.
    """

    def __init__(
        self, exchange: Traffic, reductions: Sequence[Traffic], waits: Waits, device: torch.device, on: bool = True
    ) -> None:
        self.on = on
        self._exchange, self._reductions, self._waits = exchange, list(reductions), waits
        self._cuda = device.type == "cuda"
        self._own = [0.0] * len(PHASES)
        self._phase: int | None = None
        self._since, self._waited = 0.0, 0.0
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event, int, int]] = []
        self._began: torch.cuda.Event | None = None
        self._first_transfer = 0

    def mark(self, section: str) -> None:
        """A section begins, and the phase before ends; sections that are no phase, like `save`, are not counted."""
        if not self.on:
            return
        if self._cuda:
            self._mark_stream()
        else:
            now, waited = time.perf_counter(), self._stood_still()
            if self._phase is not None:
                self._own[self._phase] += now - self._since - max(0.0, waited - self._waited)
            self._since, self._waited = now, waited
        self._phase = _PHASE_OF_SECTION.get(section)

    def take(self) -> list[float]:
        """Own seconds in each of PHASES since the last call, empty where it is off; not within a phase."""
        if not self.on:
            return []
        for phase, began, ended, first, last in self._events:
            ended.synchronize()
            waits = sum(waited.elapsed_time(over) for _, waited, over in self._exchange.on_device[first:last])
            self._own[phase] += max(0.0, began.elapsed_time(ended) - waits) / 1e3
        self._events.clear()
        taken, self._own = self._own, [0.0] * len(PHASES)
        return taken

    def _stood_still(self) -> float:
        reductions = sum(traffic.reduce_seconds for traffic in self._reductions)
        return self._exchange.exposed_seconds + reductions + self._waits.seconds

    def _mark_stream(self) -> None:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        transfers = len(self._exchange.on_device)
        if self._phase is not None and self._began is not None:
            self._events.append((self._phase, self._began, now, self._first_transfer, transfers))
        self._began, self._first_transfer = now, transfers


def no_clock() -> PhaseClock:
    """A clock that is off."""
    return PhaseClock(Traffic(), (), Waits(), torch.device("cpu"), on=False)
