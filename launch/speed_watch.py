"""Ties the rule for slow ranks to a run: the clock of each rank's own time, the comparison on rank 0, its events."""

import socket
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from launch import balance_stats
from launch.config import TelemetryConfig
from launch.phases import PhaseClock, no_clock
from launch.rebalance import Rebalancer
from launch.stragglers import Stragglers
from launch.telemetry import Telemetry
from parallel.engine import Engine
from parallel.ranks import Ranks


@dataclass
class SpeedWatch:
    """clock: of this rank. rule: on rank 0, None elsewhere and where nothing is watched."""

    clock: PhaseClock = field(default_factory=no_clock)
    rule: Stragglers | None = None
    placement: Rebalancer | None = None
    telemetry: Telemetry | None = None

    def judge(self, step: int, own_seconds: Tensor, counts: Tensor) -> dict[str, Any]:
        """Looks for ranks that are slower than the others, and writes an event for each that is or no longer is.

        Args:
            step: 1-based. own_seconds: (R, P), see `GlobalStats`. counts: (M, E) tokens per expert, global.

        Returns:
            figures for the step's record; none but on rank 0.
        """
        if self.rule is None or self.placement is None or self.telemetry is None:
            return {}
        loads = None
        if counts.numel():
            loads = balance_stats.rank_loads(counts, self.placement.ep_size, self.placement.table).sum(0)
        for found in self.rule.judge(step, own_seconds.numpy(), loads):
            self.telemetry.event("straggler", step=step, **found.fields())
        if self.rule.slowest is None:
            return {}
        rank, ratio = self.rule.slowest
        return {"slowest_rank": rank, "slowest_rank_ratio": round(ratio, 4)}


def open_watch(
    config: TelemetryConfig,
    ranks: Ranks,
    engine: Engine,
    device: torch.device,
    placement: Rebalancer,
    telemetry: Telemetry,
    *,
    on: bool,
) -> SpeedWatch:
    """The watch of one rank; collective, since rank 0 learns where the others run.

    Off with one rank, where the configuration says so, and where `on` is false: in debug mode, whose ranks are threads
    that take turns.
    """
    if not on or config.straggler_ratio == 0 or ranks.dp.size == 1:
        return SpeedWatch()
    reductions = {id(one.traffic): one.traffic for one in (ranks.dp, ranks.ep, ranks.edp)}
    clock = PhaseClock(ranks.ep.traffic, list(reductions.values()), engine.waits, device)
    hosts = ranks.dp.gather(socket.gethostname())
    rule = Stragglers(config.straggler_ratio, config.straggler_window, hosts) if ranks.dp.rank == 0 else None
    return SpeedWatch(clock, rule, placement, telemetry)
