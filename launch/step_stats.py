"""What one optimizer step adds up: over micro-steps on each rank, then over ranks in one all-reduce."""

# M MoE layers, E routed experts

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.losses import Losses
from model.routing_stats import RoutingStats
from parallel.communicator import Communicator, Traffic


@dataclass(frozen=True)
class GlobalStats:
    """One step's sums over the global batch, the same on every rank.

    losses: nats by depth. sequence_balance, batch_balance: before their coefficients. changed_by_bias: (M,) int64.
    gate_entropy: (M,) fp64, nats summed over tokens. coactivation: (M, E, E) int64 where it was collected.
    all_to_all_seconds, exposed_all_to_all_seconds: of this rank, see StepRecord. waiting_seconds: mean over ranks of
    the exposed all-to-all time beyond that of the rank which spent least in it. That rank came last every time, so
    nobody waited for the others' sake but for its; what it spent is the price of moving the bytes. bytes_sent: payload
    sent to other ranks, all ranks. own_seconds: (R, P) fp64, see `phases.PhaseClock`; P is 0 where it is off.
    """

    losses: list[float]
    sequence_balance: float
    batch_balance: float
    changed_by_bias: Tensor
    gate_entropy: Tensor
    coactivation: Tensor | None
    all_to_all_seconds: float
    exposed_all_to_all_seconds: float
    waiting_seconds: float
    bytes_sent: int
    own_seconds: Tensor


class StepStats:
    """What one rank adds up over the micro-steps of a step."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (1 + depths + 2,) fp64
        self._changed: Tensor | None = None  # (M,) int64
        self._entropy: Tensor | None = None  # (M,) fp64
        self._pairs: Tensor | None = None  # (M, E, E) int64

    def add(self, losses: Losses, routing: RoutingStats) -> None:
        """Adds one micro-step; nothing is copied to the host yet."""
        self._sums = _plus(self._sums, losses.sums)
        self._changed = _plus(self._changed, routing.changed_by_bias)
        self._entropy = _plus(self._entropy, routing.gate_entropy.detach().double())
        if routing.coactivation.numel():
            self._pairs = _plus(self._pairs, routing.coactivation)

    def reduce(self, ranks: Communicator, traffic: Traffic, own_seconds: Sequence[float] = ()) -> GlobalStats:
        """Sums over all ranks; collective.

        Args:
            ranks: all ranks of the global batch. traffic: of this rank's all-to-all during the step.
            own_seconds: of this rank by phase, as many on every rank.
        """
        assert self._sums is not None and self._changed is not None and self._entropy is not None
        table = torch.zeros(ranks.size, 1 + len(own_seconds), dtype=torch.float64)
        table[ranks.rank] = torch.tensor([traffic.exposed_seconds, *own_seconds], dtype=torch.float64)
        sent = torch.tensor([float(traffic.bytes_sent)], dtype=torch.float64)
        changed = self._changed.double().cpu()  # counts < 2**53
        own = [self._sums.cpu(), changed, self._entropy.cpu(), sent, table.flatten()]
        sums, changed, entropy, sent, flat = ranks.all_reduce(torch.cat(own)).split([len(part) for part in own])
        seconds, own_table = flat.view(table.shape).split([1, len(own_seconds)], dim=1)
        *losses, sequence, batch = sums.tolist()
        return GlobalStats(
            losses=losses,
            sequence_balance=sequence,
            batch_balance=batch,
            changed_by_bias=changed.long(),
            gate_entropy=entropy,
            coactivation=None if self._pairs is None else ranks.all_reduce(self._pairs.cpu()),
            all_to_all_seconds=traffic.seconds,
            exposed_all_to_all_seconds=traffic.exposed_seconds,
            waiting_seconds=float((seconds - seconds.min()).mean()),
            bytes_sent=int(sent),
            own_seconds=own_table,
        )


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
