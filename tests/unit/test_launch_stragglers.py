"""Slow ranks: named when they are slow for long, with what they are slow in; no alarm from noise or a single step."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from launch.config import TelemetryConfig
from launch.findings import slow_ranks
from launch.losses import Losses
from launch.phases import PHASES, PhaseClock, no_clock
from launch.step_stats import StepStats
from launch.stragglers import Straggler, Stragglers
from model.routing_stats import stack_layers
from parallel.collective_waits import Waits, count_waits
from parallel.communicator import Traffic
from parallel.threads import run_virtual_ranks

EVEN = np.array([0.01, 0.3, 0.6, 0.09])  # data, forward, backward, optimizer: one second


def watch(ranks: int, window: int = 8, limit: float = 1.5) -> Stragglers:
    return Stragglers(limit, window, [f"node-{rank // 2}" for rank in range(ranks)])


def table(ranks: int, slow: dict[int, dict[str, float]] | None = None) -> np.ndarray:
    """Even ranks, but some that need so many seconds more in a phase."""
    own = np.tile(EVEN, (ranks, 1))
    for rank, more in (slow or {}).items():
        for phase, seconds in more.items():
            own[rank, PHASES.index(phase)] += seconds
    return own


def run(rule: Stragglers, steps: list[np.ndarray], loads: Any = None) -> list[tuple[int, Straggler]]:
    return [(step, one) for step, own in enumerate(steps, 1) for one in rule.judge(step, own, loads)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_slow_rank_is_named_once_with_its_phase_and_again_when_it_is_over(ranks: int, phase: str) -> None:
    slow, even = table(ranks, {1: {phase: 0.8}}), table(ranks)
    (begins, one), (ends, over) = run(watch(ranks), [even] * 10 + [slow] * 20 + [even] * 20)
    assert 10 + 4 <= begins <= 10 + 5 and 30 + 4 <= ends <= 30 + 5  # more than half of the window
    assert (one.rank, one.host, one.phase, one.ended) == (1, "node-0", phase, False)
    assert (over.rank, over.ended, over.since) == (1, True, begins)
    assert 1.5 < one.ratio < 1.81 and one.seconds > 0.3
    assert one.fields()["reason"] == "slow" and phase in one.fields()["cause"]
    assert over.fields()["cause"].startswith("ended: rank 1 on node-0")


def test_the_ratio_of_two_ranks_is_against_the_faster() -> None:
    [(step, one)] = run(watch(2), [table(2, {0: {"forward": 1.0}})] * 20)
    assert (step, one.rank, one.ratio) == (8, 0, pytest.approx(2.0))  # not before the window is full
    assert one.seconds == pytest.approx(1.0)


def test_slow_steps_are_no_slow_rank() -> None:
    """A save, a collection of garbage, a page that had to be read: of one rank, or of each in turn."""
    slow = table(4, {2: {"forward": 30.0}})
    assert run(watch(4), ([slow] + [table(4)] * 7) * 10) == []
    in_turn = [table(4, {step % 4: {"data": 5.0}}) for step in range(100)]
    assert run(watch(4), in_turn) == []
    together = [table(4) * (50.0 if step % 3 == 0 else 1.0) for step in range(60)]
    assert run(watch(4), together) == []


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_noise_makes_no_alarm(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    noisy = [table(ranks) * rng.lognormal(0.0, 0.25, (ranks, 4)) for _ in range(300)]
    assert run(watch(ranks, window=20), noisy) == []


def test_a_slow_rank_in_noise_is_found() -> None:
    rng = np.random.default_rng(7)
    noisy = [table(64, {40: {"backward": 1.0}}) * rng.lognormal(0.0, 0.25, (64, 4)) for _ in range(100)]
    [(step, one)] = run(watch(64, window=20), noisy)
    assert (step, one.rank, one.phase) == (20, 40, "backward")


def test_a_rank_at_the_limit_does_not_come_and_go() -> None:
    above, below = table(4, {1: {"forward": 0.52}}), table(4, {1: {"forward": 0.48}})
    found = run(watch(4), ([above] * 8 + [below] * 8) * 10)
    assert [one.ended for _, one in found] == [False]


def test_several_slow_ranks_and_the_slowest() -> None:
    rule = watch(8)
    found = run(rule, [table(8, {3: {"forward": 0.7}, 5: {"data": 2.0}})] * 12)
    assert [(one.rank, one.phase) for _, one in found] == [(3, "forward"), (5, "data")]
    assert rule.slowest == (5, pytest.approx(3.0))


def test_a_rank_with_the_busier_experts_has_more_work_and_is_told_apart() -> None:
    loads = np.array([100, 220, 100, 100])  # of 130 in the mean
    busy = table(8, {1: {"forward": 0.3, "backward": 0.5}})  # ranks 1 and 5 hold the same experts
    [(_, one)] = run(watch(8), [busy] * 8, loads)
    assert one.load_ratio == pytest.approx(220 / 130)
    assert one.fields()["reason"] == "expert load" and "1.69 times the mean of tokens" in one.fields()["cause"]
    [(_, other)] = run(watch(8), [table(8, {6: {"forward": 0.8}})] * 8, loads)
    assert other.fields()["reason"] == "slow" and other.load_ratio == pytest.approx(100 / 130)
    [(_, reading)] = run(watch(8), [table(8, {5: {"data": 0.8}})] * 8, loads)
    assert reading.fields()["reason"] == "slow"  # its experts do not read its data
    [(_, too_slow)] = run(watch(8), [table(8, {1: {"forward": 4.0}})] * 8, loads)
    assert too_slow.fields()["reason"] == "slow"  # more than its load can explain


def test_times_of_nothing_are_no_ratio() -> None:
    rule = watch(2)
    assert run(rule, [np.zeros((2, 4))] * 20) == []
    assert rule.slowest == (0, 1.0)


def test_findings_say_it_in_words() -> None:
    steps = [table(2, {1: {"backward": 1.0}})] * 9 + [table(2)] * 9
    events = [{"kind": "straggler", "step": step, **one.fields()} for step, one in run(watch(2), steps)]
    [text] = slow_ranks([{"kind": "start"}, *events])
    assert text == (
        "**Rank 1 on node-0 was slow** 1 time, last from step 8 to 14: up to 2.00 times the own time of the middle "
        "rank, 1,000 ms more a step, most of it in backward."
    )
    assert "on: up to" in slow_ranks(events[:1])[0]
    assert slow_ranks([{"kind": "save"}]) == []


def test_mistakes_in_the_keys_are_named() -> None:
    assert TelemetryConfig(straggler_ratio=0.0).problems() == []
    one, two = TelemetryConfig(straggler_ratio=1.0, straggler_window=2).problems()
    assert one.startswith("telemetry.straggler_ratio = 1.0 must be more than 1")
    assert two.startswith("telemetry.straggler_window = 2 is too few steps")


def test_own_time_is_without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    exchange, reductions, waits = Traffic(), Traffic(), Waits()
    clock = PhaseClock(exchange, [reductions], waits, torch.device("cpu"))

    def passes(section: str, seconds: float, *, exposed: float = 0.0, reduced: float = 0.0, stood: float = 0.0) -> None:
        clock.mark(section)
        now[0] += seconds
        exchange.exposed_seconds += exposed
        reductions.reduce_seconds += reduced
        waits.seconds += stood

    passes("load", 50.0)
    for _ in range(2):  # two steps, the second taken before its optimizer
        passes("data", 1.0)
        passes("agree", 7.0, reduced=7.0)
        for _ in range(2):
            passes("forward", 5.0, exposed=3.0)
            passes("backward", 9.0, exposed=1.0, stood=4.0)
        clock.mark("agree")
        taken = clock.take()
        exchange.exposed_seconds = 0.0  # as the step's sums do
        passes("optimizer", 2.0, stood=0.5, reduced=0.25)
        passes("step", 0.5)
        passes("save", 30.0)
    assert taken == [1.0, 4.0, 8.0, 1.25 + 0.5]
    assert clock.take() == [0.0, 0.0, 0.0, 1.75]


def test_a_clock_that_is_off_gives_nothing() -> None:
    clock = no_clock()
    clock.mark("forward")
    clock.mark("agree")
    assert clock.take() == []


class Backend:
    """What stands for DeepSpeed's: one collective that blocks, one that returns a handle. Each takes 2 s by `now`."""

    def __init__(self, now: list[float]) -> None:
        self.asked: list[Any] = []
        self.now = now

    def all_reduce(self, tensor: Any, op: str = "sum") -> str:
        self.now[0] += 2.0
        self.asked.append((tensor, op))
        return "done"

    def reduce(self, tensor: Any, async_op: bool = False) -> "Work":
        return Work(self.now)

    def get_rank(self) -> int:
        self.now[0] += 2.0
        return 3


class Work:
    size = 5

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def wait(self, timeout: float = 0.0) -> bool:
        self.now[0] += 2.0
        return True


def test_waits_in_collectives_are_counted_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    backend = Backend(now)
    waits = count_waits(backend)
    assert count_waits(backend) is waits  # not counted twice
    assert backend.all_reduce(7, op="max") == "done" and backend.asked == [(7, "max")]
    assert waits.seconds == 2.0
    assert backend.get_rank() == 3 and waits.seconds == 2.0
    work = backend.reduce(7, async_op=True)
    assert work.size == 5 and work.wait(timeout=1.0) is True
    assert waits.seconds == 4.0


def test_every_rank_learns_every_ranks_own_time() -> None:
    def work(world: Any, rank: int) -> Any:
        stats = StepStats()
        sums = torch.zeros(3, dtype=torch.float64)
        stats.add(Losses(torch.zeros(()), sums), stack_layers([], 2, 3, torch.device("cpu")))
        communicator = world.communicator([0, 1, 2], rank)
        return stats.reduce(communicator, Traffic(9.0, 0.5 + rank, 4), [0.0 + rank, 1.0, 2.0, 3.5])

    for found in run_virtual_ranks(3, work):
        assert found.own_seconds.tolist() == [[0.0, 1.0, 2.0, 3.5], [1.0, 1.0, 2.0, 3.5], [2.0, 1.0, 2.0, 3.5]]
        assert (found.waiting_seconds, found.bytes_sent) == (pytest.approx(1.0), 12)
