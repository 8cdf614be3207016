"""The cursor: a handful of numbers that, with the dataset, say where a run's data continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data.batches import Batches, Phase
from data.errors import DataError
from data.plan import Plan

if TYPE_CHECKING:
    from data.mixture import MixedPlan

_NAMES = {
    "fingerprint": "the dataset (data.path)",
    "plan_version": "the version of the order",
    "seed": "data.seed",
    "seq_len": "data.seq_len",
    "packing": "data.packing",
    "lanes": "data.lanes",
    "window_shards": "data.window_shards",
    "mixture": "data.mixture's weights (data.weights, data.curriculum)",
}


def make_cursor(plan: Plan | MixedPlan, batches: Batches, next_step: int) -> dict[str, Any]:
    """The cursor in front of a step, to be saved in the same commit as the weights; plain JSON values.

    Keys: the plan's identity, next_step, next_sequence (order number), epoch, phases and skip_ranges (see Batches).
    """
    number = int(batches.numbers(next_step, 1)[0])
    return {
        **plan.identity(),
        "next_step": next_step,
        "next_sequence": number,
        "epoch": plan.epoch_of(number),
        "phases": [list(phase) for phase in batches.phases],
        "skip_ranges": [list(skipped) for skipped in batches.skip_ranges],
    }


def changed_keys(cursor: Mapping[str, Any], plan: Plan | MixedPlan) -> dict[str, str]:
    """What differs between a cursor's order and a plan: the identity's key -> a sentence.

    Raises:
        DataError: the cursor lacks a key.
    """
    missing = [
        key
        for key in (*_NAMES, "next_step", "next_sequence", "phases", "skip_ranges")
        if key not in cursor and key != "mixture"
    ]
    if missing:
        raise DataError(f"the data cursor lacks {', '.join(missing)}; it is not one of this program, resume elsewhere")
    here = {"mixture": [], **plan.identity()}
    there = {"mixture": [], **cursor}
    return {
        key: f"{name} was {there[key]!r} and is {here[key]!r}"
        for key, name in _NAMES.items()
        if there[key] != here[key]
    }


def check_cursor(cursor: dict[str, Any], plan: Plan | MixedPlan) -> None:
    """Checks that a cursor continues this plan.

    Raises:
        DataError: it lacks a key, or names another dataset or order; the message lists every difference.
    """
    differing = changed_keys(cursor, plan)
    if differing:
        raise DataError(
            f"the data cursor does not continue this order: {'; '.join(differing.values())}; give back the "
            "saved run's data and settings, or start a new run"
        )


def batches_of(cursor: Mapping[str, Any]) -> Batches:
    """The batch sizes and skipped ranges that a cursor has saved."""
    phases = tuple(Phase(*phase) for phase in cursor["phases"])
    skip_ranges = tuple((int(start), int(stop)) for start, stop in cursor["skip_ranges"])
    return Batches(phases, skip_ranges, phases[0].step if phases else 0)
