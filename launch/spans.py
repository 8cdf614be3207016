"""A launch's time laid end to end in stretches of one kind each, with its interruptions. See `launch.accounting`."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.supervisor import MORE_WORKERS
from launch.launches import Event, Generation, Launch, Step
from launch.runfolder import REWIND

TYPICAL_STEPS = 20  # after the first of a generation, whose time beyond their median is warm-up
LAUNCHER_LOST = "launcher"  # the cause of an interruption whose launcher left no word


@dataclass(frozen=True)
class Span:
    """A stretch of one kind. began, ended: milliseconds since the launch began."""

    began: int
    ended: int
    kind: str


@dataclass(frozen=True)
class Fault:
    """An interruption: when, on its launch's axis in milliseconds, and why."""

    at: int
    cause: str


def timeline(launch: Launch, followed: bool) -> tuple[list[Span], list[Fault], list[int]]:
    """One launch as spans without gaps from 0 on, its interruptions, and the milliseconds of each recovery.

    Args:
        followed: whether there is a later launch, so that this one has ended even if it did not say so.
    """
    spans: list[Span] = []
    faults: list[Fault] = []
    recoveries: list[int] = []
    failed_at: int | None = None  # a failure while the run recovers from another belongs to the same recovery
    for generation in launch.generations:
        own = _spans(generation, over=followed or generation.closing is not None)
        productive = next((span.began for span in own if span.kind == "productive"), None)
        if failed_at is not None and productive is not None:
            recoveries.append(productive - failed_at)
            failed_at = None
        spans += own
        closing = generation.closing
        if closing is not None and closing["kind"] == "restart":
            at = max(generation.began, _failed_at(generation.ended, closing))
            faults.append(Fault(at, closing["cause"]))
            if closing["cause"] != MORE_WORKERS and failed_at is None:
                failed_at = at
    if launch.failure is not None:
        faults.append(Fault(_last_step(launch.generations[-1]), launch.failure["cause"]))
    elif not launch.closed and followed:
        faults.append(Fault(launch.generations[-1].ended, LAUNCHER_LOST))
    if launch.evaluated:
        spans.append(Span(launch.ended, launch.ended + launch.evaluated, "evaluation"))
    return _joined(spans), faults, recoveries


def _failed_at(ended: int, restart: Event) -> int:
    """When it happened: the last sign of the rank that failed, before detection, teardown and waiting."""
    parts = ("seconds_detection", "seconds_teardown", "seconds_waiting")
    return ended - round(1000 * sum(restart.get(part) or 0.0 for part in parts))


def _last_step(generation: Generation) -> int:
    return generation.steps[-1].at if generation.steps else generation.began


class _Tape:
    """Lays spans end to end from one moment to another."""

    def __init__(self, began: int, ended: int) -> None:
        self.spans: list[Span] = []
        self.now, self.ended = began, ended

    def until(self, moment: int, kind: str) -> None:
        """All from now to this moment is of this kind."""
        moment = min(max(moment, self.now), self.ended)
        if moment > self.now:
            self.spans.append(Span(self.now, moment, kind))
            self.now = moment


def _spans(generation: Generation, over: bool) -> list[Span]:
    """A generation without gaps. over: whether it is known to have ended; else it counts to its last step."""
    tape = _Tape(generation.began, generation.ended)
    steps = generation.steps
    if steps:
        tape.until(steps[0].at - steps[0].evaluated - _work_of_first(steps), "starting")
        _step(tape, steps[0])
    back = [at for at, event in generation.marks if event["kind"] == REWIND]
    for before, step in pairwise(steps):
        tape.until(tape.now + step.saved, "saving")
        for at in back:
            if before.at <= at <= step.at:
                tape.until(at, "lost")
        _step(tape, step)
    _finish(tape, generation, over)
    return tape.spans


def _step(tape: _Tape, step: Step) -> None:
    """A step's own work, and the evaluation behind it."""
    tape.until(step.at - step.evaluated, _kind(step))
    tape.until(step.at, "evaluation" if step.kept else "lost")


def _finish(tape: _Tape, generation: Generation, over: bool) -> None:
    """What came after the last step, or instead of a first one."""
    closing, stop = generation.closing, generation.first("stop")
    before = "stopping" if generation.steps else "starting"
    if stop is not None:
        tape.until(tape.now + round(1000 * stop[1].get("seconds_saving", 0.0)), "saving")
        tape.until(stop[0], before)
        tape.until(tape.ended, "lost" if closing is None or closing["kind"] == "restart" else "stopping")
    elif not generation.steps:
        sign = tape.ended if closing is None or closing["kind"] == "end" else _failed_at(tape.ended, closing)
        tape.until(sign, "starting")
        tape.until(tape.ended, "lost")
    elif over:
        tape.until(tape.ended, "lost")


def _work_of_first(steps: Sequence[Step]) -> int:
    """How much of a generation's first step was work: as much as its later steps take, the rest was its start."""
    own = steps[0].took - steps[0].waited - steps[0].saved
    later = [step.took - step.saved for step in steps[1 : 1 + TYPICAL_STEPS]]
    return max(0, min(own, round(statistics.median(later)) if later else own))


def _kind(step: Step) -> str:
    return "productive" if step.kept and not step.skipped else "lost"


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of one kind as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].kind == span.kind:
            span = Span(joined.pop().began, span.ended, span.kind)
        joined.append(span)
    return joined
