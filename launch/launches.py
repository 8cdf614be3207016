"""A run's records cut into launches and generations, each with its steps, on one axis of time.

A launch is one call of the launcher, a generation one start of all ranks in it. The launcher's own clock carries the
axis; a rank's clock is laid on it by one comparison of wall clocks, and kept between what the launcher wrote before and
after it. A wall clock that is set back or forth meanwhile therefore moves nothing but that one comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from launch.runfolder import REWIND, RunFolder, read_lines, read_records, surviving

Event = Mapping[str, Any]

_DECIDED = (REWIND, "resume", "recovered", "peak")  # a generation that wrote one of these has chosen where it goes on


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl. Times in milliseconds: `at` on the launch's axis, when the step was over.

    took: since the step before, or since training began, less what was evaluated. waited: of these for data. saved:
    stood still for saves. evaluated: the evaluation of held-out documents behind it, before the step was over.
    kept: whether it is part of the run's history. skipped: whether the guard left the weights as they were.
    """

    step: int
    at: int
    took: int
    waited: int
    saved: int
    kept: bool
    skipped: bool
    evaluated: int = 0


@dataclass
class Generation:
    """One start of all ranks. began, ended: milliseconds; marks: (milliseconds, event) of its rank 0, in order.

    closing: the launcher's event that ended it, `restart` or `end`; None where there is none.
    """

    number: int
    began: int
    ended: int = 0
    steps: list[Step] = field(default_factory=list)
    marks: list[tuple[int, Event]] = field(default_factory=list)
    closing: Event | None = None
    shift: int | None = None  # of its rank 0's clock against the axis, milliseconds

    def first(self, *kinds: str) -> tuple[int, Event] | None:
        """The first of its marks of one of these kinds."""
        return next((mark for mark in self.marks if mark[1]["kind"] in kinds), None)


@dataclass
class Launch:
    """One call of the launcher, from 0 to `ended` milliseconds.

    time: of the wall clock, when it began; until: when it ended. evaluated: milliseconds after `ended` until its own
    evaluation was done, else 0. closed: whether it wrote its own end. failure: its event `failure`, if there is one.
    """

    time: float
    until: float
    ended: int
    evaluated: int
    closed: bool
    generations: list[Generation]
    failure: Event | None


def read_launches(run: RunFolder) -> list[Launch]:
    """The run's launches in order; empty for a run whose records do not tell (it was made before they did)."""
    events = read_records(run.events_path)
    lines = [(offset, _slim(record)) for offset, record in read_lines(run.metrics_path)]
    return launches_of(events, lines)


def _slim(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("step", "time", "seconds", "process", "step_seconds", "data_wait_seconds", "save_seconds", "skipped",
             "evaluation_seconds")  # fmt: skip
    return {name: record.get(name) for name in names}


def launches_of(events: Sequence[Event], lines: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Launch]:
    """The same from records.

    Args:
        events: events.jsonl. lines: (byte offset, record) of metrics.jsonl; `_slim`'s keys suffice.
    """
    starts = [i for i, event in enumerate(events) if event["kind"] == "launch"]
    if not starts:
        return []
    kept = set(surviving(((offset, line["step"]) for offset, line in lines), _rewinds(events)).values())
    by_process: dict[str, list[tuple[bool, Mapping[str, Any]]]] = {}
    for offset, line in lines:
        by_process.setdefault(line.get("process") or "", []).append((offset in kept, line))
    ends = [*starts[1:], len(events)]
    return [_launch(events[start:end], by_process) for start, end in zip(starts, ends, strict=True)]


def _rewinds(events: Sequence[Event]) -> list[tuple[int, int]]:
    """(bytes of metrics, step) of every return to an earlier step, one that is still to come included."""
    found = [(event.get("metrics_bytes", 0), event["step"]) for event in events if event["kind"] == REWIND]
    for event in reversed(events):
        if event["kind"] in _DECIDED:
            break
        if event["kind"] in ("restart", "failure") and event.get("step") is not None:
            found.append((2**63, event["step"]))
            break
    return found


def _launch(events: Sequence[Event], by_process: Mapping[str, Sequence[tuple[bool, Mapping[str, Any]]]]) -> Launch:
    driver = events[0]["process"]
    zero = _ms(events[0]["seconds"]) - _ms(events[0].get("seconds_before", 0.0))

    def at(event: Event) -> int:
        return _ms(event["seconds"]) - zero

    told = [event for event in events if event["process"] == driver]  # a debug run's only rank writes here too
    closing = [event for event in told if event["kind"] in ("restart", "end")]
    borders = [0, *(at(event) for event in closing)]
    generations = [Generation(number, began) for number, began in enumerate(borders[: len(closing) + 1])]
    closed = bool(closing) and closing[-1]["kind"] == "end"
    if closed:
        generations.pop()
    for generation, event in zip(generations, closing, strict=False):
        generation.ended, generation.closing = at(event), event
    for number, generation in enumerate(generations):
        first = events.index(closing[number - 1]) if number else 0
        last = events.index(closing[number]) if number < len(closing) else len(events)
        _fill(generation, events[first : last + 1], driver, zero, by_process)
    ended = generations[-1].ended
    evaluated = next((at(event) for event in reversed(told) if event["kind"] == "evaluation"), ended) if closed else 0
    wall = _wall(events[0]) - events[0].get("seconds_before", 0.0)
    failure = next((event for event in events if event["kind"] == "failure"), None)
    after = max(0, evaluated - ended)
    return Launch(wall, wall + (ended + after) / 1e3, ended, after, closed, generations, failure)


def _fill(
    generation: Generation,
    events: Sequence[Event],
    driver: str,
    zero: int,
    by_process: Mapping[str, Sequence[tuple[bool, Mapping[str, Any]]]],
) -> None:
    """Puts rank 0's marks and steps into a generation; `events` run from the driver's event before to the one after."""
    start = next((event for event in events if event["kind"] == "start"), None)
    if start is None:
        told = [_ms(event["seconds"]) - zero for event in events if event["process"] == driver]
        generation.ended = generation.ended or max(generation.began, *told)
        return
    process = start["process"]
    mine = [event for event in events[1:] if event["process"] == process and event is not generation.closing]
    again = [event["seconds"] for event in mine if event["kind"] == "start"][1:2]
    lines = [
        (kept, line)
        for kept, line in by_process.get(process, ())
        if line["seconds"] >= start["seconds"] and (not again or line["seconds"] < again[0])
        and (process != driver or not generation.closing or line["seconds"] <= generation.closing["seconds"])
    ]  # fmt: skip
    shift = zero  # of this process' clock against the axis
    if process != driver:
        first = mine[0]
        before = _ms(events[0]["seconds"]) - zero
        shift = _ms(first["seconds"]) - before - max(0, _ms(_wall(first) - _wall(events[0])))
        last = max([_ms(one["seconds"]) for one in mine] + [_ms(line["seconds"]) for _, line in lines])
        if generation.closing is not None and last - shift > generation.ended:
            shift = last - generation.ended

    def at(record: Mapping[str, Any]) -> int:
        moment = max(generation.began, _ms(record["seconds"]) - shift)
        return min(moment, generation.ended) if generation.closing is not None else moment

    generation.shift = shift
    generation.marks = [(at(event), event) for event in mine]
    generation.steps = [
        Step(
            line["step"], at(line), _ms(line.get("step_seconds")), _ms(line.get("data_wait_seconds")),
            _ms(line.get("save_seconds")), kept, bool(line.get("skipped")),
            _ms(line.get("evaluation_seconds")),
        )
        for kept, line in lines
    ]  # fmt: skip
    if generation.closing is None:
        moments = [moment for moment, _ in generation.marks] + [step.at for step in generation.steps]
        generation.ended = max([generation.began, *moments])


def _ms(seconds: float | None) -> int:
    return round(1000 * (seconds or 0.0))


def _wall(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
