"""The ledger: an order-independent hash of the sequences that a step consumed, and its line in ledger.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.order import derive_key, hash_numbers

_KEY = derive_key("trimtab ledger")


def hash_sequences(ids: np.ndarray) -> int:
    """Sum of the ids' 64-bit hashes as a signed 64-bit int.

    Sums of it, wrapping around as int64 tensors do, are the hash of the union: each rank hashes what it has consumed,
    and one all-reduce (sum, int64) gives the hash of the global batch, whatever the number of ranks.

    Args:
        ids: (n,) int64.
    """
    return int(hash_numbers(np.asarray(ids), _KEY).sum(dtype=np.uint64).astype(np.int64))


def add_hashes(first: int, second: int) -> int:
    """Sum of two hashes with the wrap-around of int64."""
    return (first + second + 2**63) % 2**64 - 2**63


def format_hash(value: int) -> str:
    """A hash as 16 hex digits."""
    return f"{value % 2**64:016x}"


def ledger_line(
    step: int, epoch: int, numbers: np.ndarray, consumed: int, plan_digest: str, skip_ranges: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The line that ledger.jsonl gets for a step.

    Keys: step (counted from 1: the optimizer steps done with it, as in metrics.jsonl), epoch (of the first sequence),
    sequences (how many), ranges (of order numbers, each [start, stop]), hash (of the sequence ids consumed), plan (its
    digest), and skip_ranges where there are any.

    Args:
        step: counted from 0, as in Stream.read; the line says step + 1.
        epoch: of the batch's first sequence.
        numbers: (G,) int64 order numbers of the global batch, rising.
        consumed: sum of the ranks' hash_sequences.
        plan_digest: Plan.digest().
        skip_ranges: order numbers left out on purpose so far.
    """
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    line: dict[str, Any] = {
        "step": step + 1,
        "epoch": epoch,
        "sequences": len(numbers),
        "ranges": [[int(run[0]), int(run[-1]) + 1] for run in runs],
        "hash": format_hash(consumed),
        "plan": plan_digest,
    }
    if skip_ranges:
        line["skip_ranges"] = [list(skipped) for skipped in skip_ranges]
    return line
