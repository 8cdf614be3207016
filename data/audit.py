"""The audit: proves from a run's ledger that its committed history consumed every sequence of the plan exactly once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.ledger import format_hash, hash_sequences
from data.mixture import MixedPlan, open_data, plan_of
from data.plan import Plan
from data.weighted import resolved

_SHOWN = 20


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        problems: empty if every step's sequences were consumed exactly once and in the plan's order.
        n_lines: lines read; n_steps: steps of the committed history; n_replaced: lines of steps that a rollback or a
            restart undid and repeated; n_torn: half-written lines that were passed over.
        n_sequences: sequences of the committed history; n_skipped: sequences left out on purpose (skip ranges).
        epochs: (epoch, sequences consumed, sequences it has) of every epoch touched; of a mixture, the epochs of each
            source, "N of SOURCE".
    """

    problems: tuple[str, ...]
    n_lines: int
    n_steps: int
    n_replaced: int
    n_torn: int
    n_sequences: int
    n_skipped: int
    epochs: tuple[tuple[int | str, int, int], ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"{self.n_steps:,} steps, {self.n_sequences:,} sequences, each exactly once"
            if self.ok
            else f"{self.n_steps:,} steps, {self.n_sequences:,} sequences: NOT exactly once",
            *(f"  epoch {epoch}: {seen:,} of {there:,} sequences" for epoch, seen, there in self.epochs),
            f"  {self.n_replaced:,} steps undone by restarts or rollbacks and repeated, {self.n_skipped:,} sequences "
            f"skipped on purpose, {self.n_torn} half-written lines passed over",
            *(f"  problem: {problem}" for problem in self.problems[:_SHOWN]),
        ]
        if len(self.problems) > _SHOWN:
            lines.append(f"  and {len(self.problems) - _SHOWN} more problems")
        return "\n".join(lines)


def audit_run(run: str | Path, data_path: str | Path | None = None) -> AuditReport:
    """Audits a run's folder: its ledger.jsonl against the dataset and the `data` section of its config.toml.

    Args:
        run: the run's folder.
        data_path: the dataset's folder, if it has moved; of data.mixture, a folder of weighted sources.

    Raises:
        DataError: the folder is not a run, its dataset cannot be opened, or its data mode keeps no ledger.
    """
    run = Path(run)
    try:
        tables = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        settings, batch = tables.get("data", {}), int(tables.get("train", {}).get("global_batch_size", 1))
        text = (run / "ledger.jsonl").read_text(encoding="utf-8", errors="replace")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{run}: is not a run that can be audited ({error}); give the folder of a run") from error
    known = {field.name for field in fields(DataConfig)}
    config = DataConfig(**{key: _frozen(value) for key, value in settings.items() if key in known})
    if config.mode != "indexed":
        raise DataError(f'{run}: ran with data.mode = "{config.mode}", which has no plan to audit against')
    if data_path:
        moved = resolved(replace(config, path=str(data_path), mixture=()))
        config = moved if moved.mixture or not config.mixture else config
    with open_data(config) as dataset:
        return audit(text.splitlines(), plan_of(dataset, config, batch))


def _frozen(value: Any) -> Any:
    """A TOML value with tuples for lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def audit(lines: Iterable[str], plan: Plan | MixedPlan) -> AuditReport:
    """Audits a ledger's lines against a plan.

    A line of step s undoes all earlier lines of steps >= s: that is what a restart from a checkpoint or a rollback did.
    What remains must be steps 1, 2, 3, ... without a gap; each step's ranges of order numbers must begin where the last
    one's ended (skip ranges apart); and the hash that the ranks reported must be that of the plan's sequences.
    """
    history, n_lines, n_torn, problems = _committed(lines)
    n_skipped = 0
    skipped = _skip_ranges(history)
    expected_start = 0
    digest = plan.digest()
    ids_by_step: list[np.ndarray] = []
    for place, entry in enumerate(history, 1):
        step = entry["step"]
        if step != place:
            problems.append(f"step {place} is missing, step {step} stands in its place")
            break
        if entry["plan"] != digest:
            problems.append(f"step {step} followed the plan {entry['plan']}, the run's data and settings give {digest}")
            break
        for start, stop in entry["ranges"]:
            if start != expected_start:
                gap = _unskipped(expected_start, start, skipped)
                if start < expected_start:
                    problems.append(f"step {step} repeats the sequences {start} to {expected_start} of the order")
                elif gap:
                    problems.append(f"step {step}: {gap} sequences from {expected_start} to {start} were lost")
                else:
                    n_skipped += start - expected_start
            expected_start = stop
        ids = _ids(plan, entry["ranges"])
        if len(ids) != entry["sequences"]:
            problems.append(f"step {step} has {len(ids)} sequences in its ranges and says {entry['sequences']}")
        if format_hash(hash_sequences(ids)) != entry["hash"]:
            problems.append(f"step {step}: the ranks consumed other sequences than the plan's (hash {entry['hash']})")
        ids_by_step.append(ids)
    epochs = tuple(_count_epochs(plan, ids_by_step, problems))
    return AuditReport(
        problems=tuple(problems),
        n_lines=n_lines,
        n_steps=len(history),
        n_replaced=n_lines - len(history),
        n_torn=n_torn,
        n_sequences=sum(len(ids) for ids in ids_by_step),
        n_skipped=n_skipped,
        epochs=epochs,
    )


def _committed(lines: Iterable[str]) -> tuple[list[dict[str, Any]], int, int, list[str]]:
    """The committed history (a line of step s undoes earlier lines of steps >= s), counts, and unusable lines."""
    history: list[dict[str, Any]] = []
    n_lines = n_torn = 0
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            n_torn += 1  # a crash while writing; if its step was not repeated, the gap shows below
            continue
        try:
            ranges = [(int(start), int(stop)) for start, stop in entry["ranges"]]
            edges = [edge for span in ranges for edge in span]
            if not edges or edges[0] < 0 or edges != sorted(edges) or any(start == stop for start, stop in ranges):
                raise ValueError(f"ranges {ranges} are not rising")
            parsed = {
                "step": int(entry["step"]),
                "sequences": int(entry["sequences"]),
                "hash": str(entry["hash"]),
                "plan": str(entry["plan"]),
                "ranges": ranges,
                "skip_ranges": [(int(start), int(stop)) for start, stop in entry.get("skip_ranges", [])],
            }
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"line {number} of the ledger is not a ledger line ({error!r})")
            continue
        n_lines += 1
        while history and history[-1]["step"] >= parsed["step"]:
            history.pop()
        history.append(parsed)
    if not history:
        problems.append("the ledger holds no step")
    return history, n_lines, n_torn, problems


def _skip_ranges(history: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return sorted({skipped for entry in history for skipped in entry["skip_ranges"]})


def _unskipped(start: int, stop: int, skipped: Iterable[tuple[int, int]]) -> int:
    """How many order numbers of [start, stop) lie in no skip range."""
    covered = np.zeros(max(0, stop - start), bool)
    for first, end in skipped:
        covered[max(0, first - start) : max(0, end - start)] = True
    return int((~covered).sum())


def _ids(plan: Plan | MixedPlan, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    numbers = [np.arange(start, stop, dtype=np.int64) for start, stop in ranges]
    return plan.sequence_ids(np.concatenate(numbers)) if numbers else np.empty(0, np.int64)


def _count_epochs(
    plan: Plan | MixedPlan, ids_by_step: list[np.ndarray], problems: list[str]
) -> Iterator[tuple[int | str, int, int]]:
    """Counts how often each sequence of each epoch was consumed, whatever the ranges say."""
    if not ids_by_step:
        return
    ids = np.sort(np.concatenate(ids_by_step))
    repeated = ids[:-1][ids[1:] == ids[:-1]]
    if len(repeated):
        problems.append(f"{len(repeated)} sequences were consumed more than once, the first is {int(repeated[0])}")
    for name, source, own in plan.parts(ids):
        epoch = source.epoch_of(int(own[0])) if len(own) else 0
        while len(own):
            stop = int(np.searchsorted(own, source.epoch_start(epoch + 1)))
            if stop:
                yield (f"{epoch} of {name}" if name else epoch), stop, source.n_sequences(epoch)
            own = own[stop:]
            epoch += 1
