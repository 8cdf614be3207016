"""Drills: faults that a run is told to have, so that its recovery can be rehearsed and tested.

    faults.inject = "kill@rank=1,step=3,phase=backward; slow@rank=0,seconds=0.2,times=0"

Each fault has a kind, a rank, and where it strikes. What has struck is noted in the run's folder (faults.jsonl) before
it does, so that `times` holds across restarts. This module reads and checks the text; `launch.drills` strikes.
"""

from dataclasses import dataclass
from typing import Any

ANYWHERE = ("start", "load", "data", "forward", "backward", "exchange", "step", "save")
SAVE_POINTS = ("before_write", "mid_write", "before_commit", "before_rename", "cleanup")
# kind -> the phases in which it can strike, the usual one first
KINDS = {
    "kill": ("forward", *ANYWHERE),
    "hang": ("forward", *ANYWHERE),
    "stop": ("forward", *ANYWHERE),
    "slow": ("forward", *ANYWHERE),
    "raise": ("forward", *ANYWHERE),
    "nan": ("backward",),
    "flip": ("step",),
    "full_disk": ("save",),
    "bad_read": ("data",),
    "clock": ("forward", *ANYWHERE),
}
KEYS = ("rank", "step", "phase", "at", "times", "seconds")
STEPLESS = ("start", "load")
LARGEST = 1_000_000_000  # of a rank, a step, a count or a number of seconds


@dataclass(frozen=True)
class Fault:
    """One fault. step: 1-based as in the metrics, 0 is any; in phase save the step that is saved. times: 0 is always.

    at: the point of a save, "" is its first. seconds: of slow, of hang (0: for ever), and by which a clock jumps.
    """

    kind: str
    rank: int = 0
    step: int = 0
    phase: str = "forward"
    at: str = ""
    times: int = 1
    seconds: float = 0.0
    text: str = ""

    def strikes(self, phase: str, step: int | None, at: str) -> bool:
        """Whether this is its place."""
        return self.phase == phase and self.step in (0, step) and (self.at or SAVE_POINTS[0]) == (at or SAVE_POINTS[0])


@dataclass(frozen=True)
class FaultsConfig:
    """Drills: faults that a run is told to have.

    inject: the faults, several joined with ";", as docs/survival.md describes them; empty for none.
    """

    inject: str = ""

    def problems(self) -> list[str]:
        """Returns every mistake in `inject`, each starting with its dotted key."""
        return parse(self.inject)[1]


def parse(text: str) -> tuple[list[Fault], list[str]]:
    """The faults in a text, and a sentence for every mistake."""
    faults, problems = [], []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        wrong: list[str] = []
        fault = _parse_one(part, wrong)
        problems += [f"faults.inject: {part!r}: {sentence}" for sentence in wrong]
        if not wrong:
            faults.append(fault)
    return faults, problems


def _parse_one(text: str, wrong: list[str]) -> Fault:
    kind, _, rest = text.partition("@")
    kind = kind.strip()
    if kind not in KINDS:
        wrong.append(f"{kind!r} is no kind of fault; use one of {', '.join(KINDS)}, as in kill@rank=1,step=3")
        return Fault(kind)
    values: dict[str, Any] = {"phase": KINDS[kind][0], "text": text}
    for pair in filter(None, (pair.strip() for pair in rest.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if key not in KEYS or not equals:
            wrong.append(f"{pair!r} is not one of {', '.join(f'{known}=...' for known in KEYS)}")
            continue
        try:
            values[key] = {"phase": str, "at": str, "seconds": float}.get(key, int)(value)
        except ValueError:
            wrong.append(f"{key}={value} must be a number")
            continue
        if key in ("phase", "at"):
            continue
        if (kind, key) == ("clock", "seconds") and not abs(values[key]) <= LARGEST:
            values[key] = 0.0  # refused below
        elif not abs(values[key]) <= LARGEST:
            wrong.append(f"{key}={value[:40]} must be a number of at most {LARGEST:,}")
        elif values[key] < 0 and (kind, key) != ("clock", "seconds"):
            wrong.append(f"{key}={value} must not be negative")
    fault = Fault(kind, **values)
    if fault.phase not in KINDS[kind]:
        wrong.append(f"phase={fault.phase} is not where {kind} can strike; use {', '.join(dict.fromkeys(KINDS[kind]))}")
    elif "at" in values and (fault.phase != "save" or fault.at not in SAVE_POINTS):
        wrong.append(f"at={fault.at} needs phase=save and one of {', '.join(SAVE_POINTS)}")
    if "step" in values and fault.phase in STEPLESS:
        wrong.append(f"phase={fault.phase} is before the first step; leave step out")
    if "seconds" in values and kind not in ("slow", "hang", "clock"):
        wrong.append(f"seconds={fault.seconds:g} is for slow, hang and clock")
    if kind == "clock" and not fault.seconds:
        wrong.append("clock needs seconds=..., by which it jumps; negative is back, as in clock@step=3,seconds=-3600")
    return fault


def rank_problems(text: str, world_size: int) -> list[str]:
    """A sentence for every fault of a rank that this world does not have."""
    return [
        f"faults.inject: {fault.text!r}: rank={fault.rank} does not exist in a world of {world_size} ranks; "
        f"use 0 to {world_size - 1}"
        for fault in parse(text)[0]
        if fault.rank >= world_size
    ]
