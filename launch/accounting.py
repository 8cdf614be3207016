"""Where a run's time went: each millisecond of its launches is of exactly one kind. A pure function of its records.

    productive   steps that are part of the run's history
    lost         steps that were done again, rolled back or skipped; from a fault to the next start
    saving       training stood still for a checkpoint
    starting     processes, rendezvous, assembly, loading, the first batch, warm-up and compilation
    stopping     from the last step or save to the end of the launcher
    evaluation   held-out documents, while training goes on (train.evaluate_every_steps) and behind its end

Time between two launches is nobody's. Goodput is productive over all; time to recover is from a failure (the last sign
of the rank that failed) to the start of the next step that stays in the history.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.console import duration
from launch.launches import Launch, read_launches
from launch.runfolder import DamagedRecordError, RunFolder
from launch.spans import Fault, Span, timeline

KINDS = ("productive", "lost", "saving", "starting", "stopping", "evaluation")


@dataclass(frozen=True)
class Timeline:
    """One launch. time: of the wall clock when it began. spans: without gaps from 0 on."""

    time: float
    spans: tuple[Span, ...]
    faults: tuple[Fault, ...]

    @property
    def ended(self) -> int:
        """Milliseconds from its start to its end."""
        return self.spans[-1].ended if self.spans else 0


@dataclass(frozen=True)
class Account:
    """Where the time of a run went.

    milliseconds: of each of KINDS. steps: in the history. lost_steps: done and given up. skipped_steps: in the history,
    without effect on the weights. recoveries: milliseconds from each failure to the next productive step.
    idle_seconds: between launches, by the wall clock. open: whether its last launch has not told its end.
    until: where the account ends by the clock of the process that trained last; None where none has begun.
    """

    milliseconds: Mapping[str, int]
    steps: int
    lost_steps: int
    skipped_steps: int
    interruptions: Mapping[str, int]
    recoveries: tuple[int, ...]
    generations: int
    idle_seconds: float
    open: bool
    timelines: tuple[Timeline, ...]
    until: float | None

    @property
    def wall_ms(self) -> int:
        """All launches together; the sum of the kinds."""
        return sum(one.ended for one in self.timelines)

    @property
    def goodput(self) -> float | None:
        """Productive time over all; None before there was any."""
        return self.milliseconds["productive"] / self.wall_ms if self.wall_ms else None

    def figures(self) -> dict[str, Any]:
        """For events and `--json`; seconds with three decimals, whose sum over the kinds is `wall_seconds`."""
        recover = statistics.fmean(self.recoveries) / 1e3 if self.recoveries else None
        return {
            "wall_seconds": self.wall_ms / 1e3,
            **{f"{kind}_seconds": self.milliseconds[kind] / 1e3 for kind in KINDS},
            "goodput": None if self.goodput is None else round(self.goodput, 6),
            "mean_seconds_to_recover": None if recover is None else round(recover, 3),
            "interruptions": dict(self.interruptions),
            "steps": self.steps,
            "lost_steps": self.lost_steps,
            "skipped_steps": self.skipped_steps,
            "launches": len(self.timelines),
            "generations": self.generations,
            "idle_seconds": round(self.idle_seconds, 3),
        }


class Running:
    """The account of a run that goes on, kept up step by step for curves; what was told before is not read again.

    Args:
        account: of the run so far. now: seconds by this process' clock. kind: of the time from its end until now.
    """

    def __init__(self, account: Account, now: float, kind: str) -> None:
        self._seconds = {kind: ms / 1e3 for kind, ms in account.milliseconds.items()}
        self._seconds[kind] += max(0.0, now - (now if account.until is None else account.until))
        self._now = now

    def add(self, figures: Mapping[str, Any], now: float) -> dict[str, float]:
        """Takes one step's record, done at `now`; returns scalars for TensorBoard."""
        passed, self._now = max(0.0, now - self._now), now
        saved = min(passed, figures.get("save_seconds") or 0.0)
        evaluated = min(passed - saved, figures.get("evaluation_seconds") or 0.0)
        self._seconds["saving"] += saved
        self._seconds["evaluation"] += evaluated
        self._seconds["lost" if figures.get("skipped") else "productive"] += passed - saved - evaluated
        wall = sum(self._seconds.values())
        tags = {
            f"time/{kind}_seconds": seconds
            for kind, seconds in self._seconds.items()
            if kind != "evaluation" or seconds  # behind the end of training there is no curve
        }
        return {"time/goodput": self._seconds["productive"] / wall, **tags} if wall else tags


def in_words(account: Account) -> str:
    """One line: ``5:12 in all, 83.1% productive (goodput), lost 31.0 s (12 steps), ...``."""
    parts = [f"{kind} {spent(account.milliseconds[kind])}" for kind in KINDS[1:] if account.milliseconds[kind] > 4]
    if account.lost_steps:
        parts = [f"{part} ({account.lost_steps} steps)" if part.startswith("lost") else part for part in parts]
    text = f"{spent(account.wall_ms)} in all, {100 * (account.goodput or 0.0):.1f}% productive (goodput)"
    text = ", ".join([text, *parts])
    if account.interruptions:
        text += "; interrupted by " + ", ".join(f"{cause} {count}x" for cause, count in account.interruptions.items())
    if account.recoveries:
        text += f"; recovered after {spent(statistics.fmean(account.recoveries))} on average"
    return text


def spent(milliseconds: float) -> str:
    """A time for people: ``0.11 s``, ``31.0 s``, ``5:12``."""
    seconds = milliseconds / 1e3
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def read_account(run_dir: str | Path | RunFolder) -> Account | None:
    """The account of a run, finished or not; None where its records do not tell launches apart."""
    run = run_dir if isinstance(run_dir, RunFolder) else RunFolder(run_dir)
    return account(read_launches(run))


def record_account(run: RunFolder, cause: str, **fields: Any) -> None:
    """Writes the event `accounting`; a run whose records or disk do not allow that goes on without."""
    try:
        found = read_account(run)
        if found is not None:
            run.event("accounting", cause=cause, **fields, **found.figures())
    except (OSError, DamagedRecordError) as error:
        print(f"the run's time was not accounted for: {error}", file=sys.stderr, flush=True)


def account(launches: Sequence[Launch]) -> Account | None:
    """The account of launches, in order; None without any."""
    if not launches:
        return None
    timelines, recoveries, interruptions = [], [], dict[str, int]()
    for number, launch in enumerate(launches):
        spans, faults, recovered = timeline(launch, followed=number + 1 < len(launches))
        timelines.append(Timeline(launch.time, tuple(spans), tuple(faults)))
        recoveries += recovered
        for fault in faults:
            interruptions[fault.cause] = interruptions.get(fault.cause, 0) + 1
    totals = dict.fromkeys(KINDS, 0)
    for one in timelines:
        for span in one.spans:
            totals[span.kind] += span.ended - span.began
    shift = launches[-1].generations[-1].shift
    steps = [step for launch in launches for generation in launch.generations for step in generation.steps]
    return Account(
        totals,
        steps=sum(step.kept for step in steps),
        lost_steps=sum(not step.kept for step in steps),
        skipped_steps=sum(step.kept and step.skipped for step in steps),
        interruptions=interruptions,
        recoveries=tuple(recoveries),
        generations=sum(len(launch.generations) for launch in launches),
        idle_seconds=math.fsum(max(0.0, after.time - before.until) for before, after in pairwise(launches)),
        open=not launches[-1].closed,
        timelines=tuple(timelines),
        until=None if shift is None else (timelines[-1].ended + shift) / 1e3,
    )
