"""How an order of the data goes on at a resume, and the record of all orders that a run has followed.

What a run reads next follows from its cursor and its settings alone:

    nothing changed              the cursor's own batches and skipped ranges
    another global batch size    the same order from the same number on, in batches of another size
    weights or a curriculum      the same numbers below the cursor's, and each source goes on where it stands
    anything else of `data`      another order, which begins at its first sequence: where the old one stopped says
                                 nothing about the new one, and what was read in the old one may be read again

orders.jsonl in the run's folder has a line for each order, so that the audit can check every step against the one that
it followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from data.batches import Batches
from data.config import DataConfig
from data.cursor import batches_of, changed_keys
from data.dataset import Dataset
from data.errors import DataError
from data.mixture import MixedDataset, MixedPlan, plan_of
from data.plan import Plan

NAME = "orders.jsonl"


class Order(NamedTuple):
    """What a run reads from a step on.

    Attributes:
        plan, batches: see there.
        changed: what differs from the cursor's order, as sentences; empty where the order is the same.
        keys: for each change, the keys of the configuration that may have made it.
        exact: whether every sequence of the old order before the cursor, and none of those after it, counts as read.
        resized: (old, new) sequences a step where the global batch size changes here, else None.
    """

    plan: Plan | MixedPlan
    batches: Batches
    changed: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    exact: bool
    resized: tuple[int, int] | None


def go_on(
    dataset: Dataset | MixedDataset, config: DataConfig, global_batch_size: int, cursor: Mapping[str, Any]
) -> Order:
    """The order in which a run goes on from a cursor.

    Args:
        dataset: from `open_data(config)`. config: the `data` section as it is now. cursor: as it was saved.

    Raises:
        DataError: the cursor is not one of this program.
    """
    step = int(cursor["next_step"])
    saved = batches_of(cursor)
    size = saved.size(step)
    batches = saved if size == global_batch_size else saved.then(step, global_batch_size)
    number = int(batches.numbers(step, 1)[0])
    if number != int(cursor["next_sequence"]):
        raise DataError(
            f"the data cursor of step {step} names sequence {cursor['next_sequence']} and its batches give {number}; "
            "it was changed after it was written, go back to an older checkpoint"
        )
    same = cursor.get("fingerprint") == dataset.fingerprint
    plan = plan_of(dataset, config, batches, cursor.get("mixture", ()) if same else (), number)
    differing = changed_keys(cursor, plan)
    resized = None if size == global_batch_size else (size, global_batch_size)
    if set(differing) <= {"mixture"}:
        return Order(plan, batches, tuple(differing.values()), (_KEYS["mixture"],) * len(differing), True, resized)
    begun = Batches.beginning(step, global_batch_size)
    keys = tuple(_KEYS.get(key, (f"data.{key}",)) for key in differing)
    return Order(plan_of(dataset, config, begun), begun, tuple(differing.values()), keys, False, resized)


_KEYS = {
    "fingerprint": ("data.path", "data.mixture"),
    "mixture": ("data.weights", "data.curriculum", "data.mixture", "train.global_batch_size"),
}
_ORDERING = ("seed", "seq_len", "packing", "lanes", "window_shards", "weights", "curriculum")


class Recorded(NamedTuple):
    """A line of orders.jsonl.

    Attributes:
        plan: digest. step: steps done before the order's first one. exact: see `Order`.
        data: the `data` section. phases: of the mixture, empty where there is none. fingerprint: of the dataset.
        global_batch_size: at its first step.
    """

    plan: str
    step: int
    exact: bool
    data: dict[str, Any]
    phases: list[list[int]]
    fingerprint: str
    global_batch_size: int

    def settings(self) -> DataConfig:
        """The `data` section as a configuration."""
        known = {field.name for field in fields(DataConfig)}
        return DataConfig(**{key: _frozen(value) for key, value in self.data.items() if key in known})

    def same_settings(self, config: DataConfig, fingerprint: str) -> bool:
        """Whether these settings and this dataset are the ones of the order."""
        own = self.settings()
        return fingerprint == self.fingerprint and all(getattr(own, key) == getattr(config, key) for key in _ORDERING)

    def rebuilt(self, dataset: Dataset | MixedDataset) -> Plan | MixedPlan:
        """The order again, from opened data."""
        return plan_of(dataset, self.settings(), self.global_batch_size, self.phases, None)


def record(
    plan: Plan | MixedPlan, config: DataConfig, step: int, exact: bool, global_batch_size: int
) -> dict[str, Any]:
    """The line of orders.jsonl for an order that begins behind `step` steps; see `Recorded`."""
    identity: dict[str, Any] = plan.identity()
    return {
        "plan": plan.digest(),
        "step": step,
        "exact": exact,
        "data": asdict(config),
        "phases": identity.get("mixture", []),
        "fingerprint": identity["fingerprint"],
        "global_batch_size": global_batch_size,
    }


def recorded(path: Path) -> list[Recorded]:
    """The orders that a run has followed, in the order of writing; empty where an older version wrote none.

    Half-written lines are passed over.
    """
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            told = json.loads(line)
            found.append(Recorded(**{name: told[name] for name in Recorded._fields}))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def last_of(found: Sequence[Recorded], digest: str) -> Recorded | None:
    """The last record of an order, None where there is none."""
    return next((one for one in reversed(found) if one.plan == digest), None)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
