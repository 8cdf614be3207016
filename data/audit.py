"""The audit: proves from a run's ledger that its committed history consumed every sequence of the plan exactly once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import DataError
from data.ledger import format_hash, hash_sequences
from data.mixture import MixedDataset, MixedPlan, open_data, plan_of
from data.orders import NAME as ORDERS
from data.orders import Recorded, last_of, recorded
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
        notes: what is proven of a run whose settings of the data were changed, as sentences.
    """

    problems: tuple[str, ...]
    n_lines: int
    n_steps: int
    n_replaced: int
    n_torn: int
    n_sequences: int
    n_skipped: int
    epochs: tuple[tuple[int | str, int, int], ...]
    notes: tuple[str, ...] = ()

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
            *(f"  {note}" for note in self.notes),
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
    records = recorded(run / ORDERS)
    with ExitStack() as stack:
        dataset = _opened(config, stack)
        opened: dict[str, Dataset | MixedDataset | str] = {dataset.fingerprint: dataset}

        def rebuilt(digest: str) -> Plan | MixedPlan | str:
            told = last_of(records, digest)
            if told is None:
                return f"nothing in {run / ORDERS} says what the order {digest} was"
            if told.fingerprint not in opened:
                opened[told.fingerprint] = _open_again(told, stack)
            found = opened[told.fingerprint]
            return found if isinstance(found, str) else told.rebuilt(found)

        return audit(text.splitlines(), plan_of(dataset, config, batch), records, rebuilt)


def _opened(config: DataConfig, stack: ExitStack) -> Dataset | MixedDataset:
    dataset = open_data(config)
    stack.callback(dataset.close)
    return dataset


def _open_again(told: Recorded, stack: ExitStack) -> Dataset | MixedDataset | str:
    """The dataset of an order that is over, or why it is not at hand."""
    try:
        found = _opened(told.settings(), stack)
    except DataError as error:
        return str(error)
    if found.fingerprint != told.fingerprint:
        return f"{found.path} holds another dataset now"
    return found


def _frozen(value: Any) -> Any:
    """A TOML value with tuples for lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


Rebuilt = Callable[[str], "Plan | MixedPlan | str"]


def audit(
    lines: Iterable[str],
    plan: Plan | MixedPlan,
    records: Sequence[Recorded] = (),
    rebuilt: Rebuilt | None = None,
) -> AuditReport:
    """Audits a ledger's lines against a plan, or against one after the other where the data's settings were changed.

    A line of step s undoes all earlier lines of steps >= s: that is what a restart from a checkpoint or a rollback did.
    What remains must be steps 1, 2, 3, ... without a gap; each step's ranges of order numbers must begin where the last
    one's ended (skip ranges apart), however many sequences a step has; and the hash that the ranks reported must be
    that of the plan's sequences. Another order of the data begins at its first sequence, and is checked by itself.

    Args:
        plan: by the run's settings as they are now.
        records: the orders that the run has followed, from orders.jsonl.
        rebuilt: gives the plan of a recorded order by its digest, or a sentence that says why it is not at hand.
    """
    history, n_lines, n_torn, problems = _committed(lines)
    for place, entry in enumerate(history, 1):
        if entry["step"] != place:
            problems.append(f"step {place} is missing, step {entry['step']} stands in its place")
            history = history[: place - 1]
            break
    parts = _parts(history, plan, records, rebuilt, problems)
    n_skipped, n_sequences, notes = 0, 0, []
    epochs: list[tuple[int | str, int, int]] = []
    for number, part in enumerate(parts, 1):
        skipped, ids = _check_part(part, problems)
        n_skipped += skipped
        n_sequences += sum(len(own) for own in ids)
        name = f"{part.digest} of steps {part.first} to {part.last}"
        if part.plan is not None:
            counted = list(_count_epochs(part.plan, ids, problems))
            epochs += (
                counted
                if len(parts) == 1
                else [(f"{epoch} of order {name}", seen, there) for epoch, seen, there in counted]
            )
        if len(parts) > 1:
            begins = "" if number == 1 else "; it began at its first sequence, so text read before may be read again"
            notes.append(f"order {name} was checked by itself{begins}")
    return AuditReport(
        problems=tuple(problems),
        n_lines=n_lines,
        n_steps=sum(len(part.entries) for part in parts),
        n_replaced=n_lines - sum(len(part.entries) for part in parts),
        n_torn=n_torn,
        n_sequences=n_sequences,
        n_skipped=n_skipped,
        epochs=tuple(epochs),
        notes=tuple(notes),
    )


@dataclass
class _Part:
    """Steps in a row whose order numbers go on from each other; `plan` is None where it cannot be rebuilt.

    digest: of the last order. entries: (ledger line, its plan).
    """

    digest: str
    plan: Plan | MixedPlan | None
    entries: list[tuple[dict[str, Any], Plan | MixedPlan | None]]

    @property
    def first(self) -> int:
        return int(self.entries[0][0]["step"])

    @property
    def last(self) -> int:
        return int(self.entries[-1][0]["step"])


def _parts(
    history: Sequence[dict[str, Any]],
    plan: Plan | MixedPlan,
    records: Sequence[Recorded],
    rebuilt: Rebuilt | None,
    problems: list[str],
) -> list[_Part]:
    """The history cut where another order of the data began; appends every order that nothing explains."""
    now, parts = plan.digest(), list[_Part]()
    plans: dict[str, Plan | MixedPlan | None] = {now: plan}
    before = ""
    for entry in history:
        digest, step = entry["plan"], entry["step"]
        if digest not in plans:
            found = rebuilt(digest) if rebuilt is not None and last_of(records, digest) is not None else None
            plans[digest] = None if isinstance(found, str) else found
            if found is None:
                problems.append(f"step {step} followed the plan {digest}, the run's data and settings give {now}")
                return parts
            if isinstance(found, str):
                problems.append(f"the steps from {step} on that followed the order {digest} are not proven: {found}")
        told = [one for one in records if one.plan == digest and one.step == step - 1]
        if before and digest != before and not told:
            problems.append(
                f"step {step} follows the order {digest} and step {step - 1} another; no change was accepted"
            )
            return parts
        if not parts or (digest != before and not told[-1].exact):
            parts.append(_Part(digest, plans[digest], []))
        parts[-1].entries.append((entry, plans[digest]))
        parts[-1].digest, parts[-1].plan, before = digest, plans[digest], digest
    return parts


def _check_part(part: _Part, problems: list[str]) -> tuple[int, list[np.ndarray]]:
    """Appends what is wrong with steps in a row; returns the sequences left out, and the ids of each step."""
    skipped = _skip_ranges([entry for entry, _ in part.entries])
    n_skipped = expected_start = 0
    ids_by_step: list[np.ndarray] = []
    for entry, plan in part.entries:
        step = entry["step"]
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
        n = sum(stop - start for start, stop in entry["ranges"])
        ids = np.empty(0, np.int64) if plan is None else _ids(plan, entry["ranges"])
        if n != entry["sequences"]:
            problems.append(f"step {step} has {n} sequences in its ranges and says {entry['sequences']}")
        if plan is not None and format_hash(hash_sequences(ids)) != entry["hash"]:
            problems.append(f"step {step}: the ranks consumed other sequences than the plan's (hash {entry['hash']})")
        ids_by_step.append(ids)
    return n_skipped, ids_by_step


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
