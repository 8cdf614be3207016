"""Several datasets mixed by weights, as one plan and one dataset: still a pure function of numbers.

Order number n of the mixture belongs to a source by a fixed pattern: weights become whole slots of a cycle of 1000
(largest remainders first), and each source's slots are spread evenly over it. How many of the numbers below n belong
to a source is therefore arithmetic, and that count is the order number in the source's own plan. A curriculum changes
the weights at given numbers; the counts go on.

Exactly once means, for each source by itself: the mixture consumes its sequences in the order of its own plan, the
numbers 0, 1, 2, ... without a gap, so all of epoch 0 before any of epoch 1; when an epoch ends depends on the weights.
The sequence ids of source i of k are its own ids times k, plus i.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.batches import Batches
from data.config import DataConfig
from data.dataset import Dataset, HeldoutDocument, Split, open_dataset
from data.errors import DataError
from data.plan import PLAN_VERSION, EpochSteps, Plan
from data.tokenizer import Tokenizer
from data.weighted import resolved
from data.windows import Piece, PieceTable, join_tables

CYCLE = 1000


class Phase(NamedTuple):
    """From order number `first` on, the sources have these weights."""

    first: int
    weights: tuple[float, ...]


class _Pattern(NamedTuple):
    """One phase's cycle: the source of each slot (CYCLE,), the slots of each source before each (CYCLE + 1, k), and the
    numbers of each source before the phase (k,)."""

    sources: np.ndarray
    before: np.ndarray
    base: np.ndarray


def slots(weights: Sequence[float]) -> list[int]:
    """Whole slots of a cycle for weights, by largest remainders; a positive weight has at least one."""
    total = sum(weights)
    shares = [weight / total * CYCLE for weight in weights]
    found = [max(1, int(share)) if weight > 0 else 0 for share, weight in zip(shares, weights, strict=True)]
    while missing := CYCLE - sum(found):
        if missing > 0:
            found[max(range(len(found)), key=lambda source: (shares[source] - found[source], -source))] += 1
        else:  # tiny weights were rounded up to one slot
            found[found.index(max(found))] -= 1
    return found


def pattern(counts: Sequence[int]) -> np.ndarray:
    """The source of each slot of a cycle, (CYCLE,) int64: slot j of m of a source lies near (j + 1/2) / m."""
    places = [((2 * j + 1) / (2 * count), source) for source, count in enumerate(counts) for j in range(count)]
    return np.array([source for _, source in sorted(places)], np.int64)


class MixedPlan:
    """The order of a mixture; what Stream and the audit ask of a Plan.

    Args:
        plans: of the sources, with equal seq_len and lanes.
        phases: the weights, the first from number 0 on.
        names: of the sources, for people.
    """

    def __init__(self, plans: Sequence[Plan], phases: Sequence[Phase], names: Sequence[str]) -> None:
        self.plans, self.phases, self.names = tuple(plans), tuple(phases), tuple(names)
        self.seq_len, self.lanes = plans[0].seq_len, plans[0].lanes
        self.fingerprint = mixed_fingerprint([plan.fingerprint for plan in plans])
        self._shard_offsets = np.cumsum([0, *(plan.n_shards for plan in plans)]).tolist()
        self._firsts = [phase.first for phase in phases]
        self._patterns: list[_Pattern] = []
        base = np.zeros(len(plans), np.int64)
        for place, phase in enumerate(phases):
            sources = pattern(slots(phase.weights))
            before = np.zeros((CYCLE + 1, len(plans)), np.int64)
            np.cumsum(sources[:, None] == np.arange(len(plans)), axis=0, out=before[1:])
            self._patterns.append(_Pattern(sources, before, base))
            if place + 1 < len(phases):
                cycles, rest = divmod(phases[place + 1].first - phase.first, CYCLE)
                base = base + cycles * before[-1] + before[rest]

    def identity(self) -> dict[str, Any]:
        """Everything that the order depends on."""
        return {
            **self.plans[0].identity(),
            "plan_version": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "mixture": [[phase.first, *slots(phase.weights)] for phase in self.phases],
        }

    def digest(self) -> str:
        """A short hash of the identity, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode("utf-8")).hexdigest()[:16]

    def phase_of(self, number: int) -> int:
        """The place, from 0, of the phase that an order number belongs to."""
        return bisect_right(self._firsts, number) - 1

    def locate(self, number: int) -> tuple[int, int]:
        """The source of an order number, and the order number in that source's plan."""
        place = self.phase_of(number)
        found = self._patterns[place]
        cycle, slot = divmod(number - self._firsts[place], CYCLE)
        source = int(found.sources[slot])
        return source, int(found.base[source] + cycle * found.before[-1, source] + found.before[slot, source])

    def sequence_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Sequence ids (n,) int64 of order numbers (n,) int64, rising."""
        located = np.array([self.locate(number) for number in numbers.tolist()], np.int64).reshape(-1, 2)
        ids = np.empty(len(numbers), np.int64)
        for source, plan in enumerate(self.plans):
            own = located[:, 0] == source
            if own.any():
                ids[own] = plan.sequence_ids(located[own, 1]) * len(self.plans) + source
        return ids

    def batch(self, step: int, global_batch_size: int) -> np.ndarray:
        """As Plan.batch."""
        first = step * global_batch_size
        return self.sequence_ids(np.arange(first, first + global_batch_size, dtype=np.int64))

    def table(self, ids: np.ndarray) -> PieceTable:
        """As Plan.table, with shards numbered through all sources."""
        own, sources = np.divmod(ids, len(self.plans))
        tables = []
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            found = self.plans[source].table(own[places])
            tables.append(
                found._replace(sequence=places[found.sequence], shard=found.shard + self._shard_offsets[source])
            )
        joined = join_tables(tables)
        order = np.argsort(joined.sequence, kind="stable")
        return PieceTable(*(column[order] for column in joined))

    def pieces(self, sequence: int) -> list[Piece]:
        """As Plan.pieces."""
        return list(map(Piece._make, self.table(np.array([sequence])).by_sequence(1)[0]))

    def shards_near(self, sequence: int) -> set[int]:
        """As Plan.shards_near."""
        own, source = divmod(sequence, len(self.plans))
        return {shard + self._shard_offsets[source] for shard in self.plans[source].shards_near(own)}

    def epoch_of(self, number: int) -> int:
        """The epoch of an order number's sequence, in its source."""
        source, own = self.locate(number)
        return self.plans[source].epoch_of(own)

    def n_sequences(self, epoch: int = 0) -> int:
        """Sequences of that epoch in all sources together."""
        return sum(plan.n_sequences(epoch) for plan in self.plans)

    def epoch_steps(self, global_batch_size: int, epoch: int = 0) -> EpochSteps:
        """Steps that one epoch of every source would fill; the sources do not end together."""
        return EpochSteps(self.n_sequences(epoch), *divmod(self.n_sequences(epoch), global_batch_size))

    def parts(self, ids: np.ndarray) -> Iterator[tuple[str, Plan, np.ndarray]]:
        """The sequence ids (n,) of each source as its own plan numbers them."""
        for source, (name, plan) in enumerate(zip(self.names, self.plans, strict=True)):
            yield name, plan, ids[ids % len(self.plans) == source] // len(self.plans)


class MixedSplit:
    """The training documents of all sources, shards numbered through. What a stream asks of a Split."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = tuple(splits)
        self._firsts = np.cumsum([0, *(len(split.info.shards) for split in splits)])[:-1].tolist()
        self.dtype, self.vocab_size = splits[0].dtype, splits[0].vocab_size

    def read(self, shard: int, row: int) -> np.ndarray:
        """As Split.read."""
        split, own = self._locate(shard)
        return split.read(own, row)

    def read_bytes(self, shard: int, row: int) -> bytes:
        """As Split.read_bytes."""
        split, own = self._locate(shard)
        return split.read_bytes(own, row)

    def read_range(self, shard: int, row: int, start: int, stop: int) -> bytes:
        """As Split.read_range."""
        split, own = self._locate(shard)
        return split.read_range(own, row, start, stop)

    def check_vocabulary(self, shard: int, row: int, tokens: np.ndarray) -> None:
        """As Split.check_vocabulary."""
        split, own = self._locate(shard)
        split.check_vocabulary(own, row, tokens)

    def prefetch(self, shards: Iterable[int]) -> None:
        """As Split.prefetch."""
        for shard in shards:
            split, own = self._locate(shard)
            split.prefetch([own])

    def _locate(self, shard: int) -> tuple[Split, int]:
        place = bisect_right(self._firsts, shard) - 1
        return self._splits[place], shard - self._firsts[place]


class MixedDataset:
    """Opened datasets of one tokenizer, as one. What a stream and an evaluation ask of a Dataset.

    Raises:
        DataError: their tokenizers differ.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self.manifest = datasets[0].manifest
        self.path = ", ".join(str(dataset.path) for dataset in datasets)
        for other in datasets[1:]:
            if other.manifest.tokenizer_sha256 != self.manifest.tokenizer_sha256:
                raise DataError(
                    f"data.mixture: {other.path} was packed with the tokenizer {other.manifest.tokenizer}, "
                    f"{datasets[0].path} with {self.manifest.tokenizer}, and they are not the same; pack both with the "
                    f"tokenizer.json of one of them"
                )
            if other.manifest.eod_id != self.manifest.eod_id:
                raise DataError(
                    f"data.mixture: documents of {other.path} end with token {other.manifest.eod_id}, those of "
                    f"{datasets[0].path} with {self.manifest.eod_id}; pack both with the same --end-token"
                )
        self.fingerprint = mixed_fingerprint([dataset.fingerprint for dataset in datasets])
        self.train = MixedSplit([dataset.train for dataset in datasets])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sources."""
        return self.datasets[0].tokenizer

    @property
    def lossless(self) -> bool:
        """Whether every source is, see `Dataset.lossless`."""
        return all(dataset.lossless for dataset in self.datasets)

    def heldout_documents(self) -> Iterator[HeldoutDocument]:
        """The held-out documents of all sources."""
        for dataset in self.datasets:
            yield from dataset.heldout_documents()

    def close(self) -> None:
        """Closes all sources."""
        for dataset in self.datasets:
            dataset.close()

    def __enter__(self) -> MixedDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def mixed_fingerprint(fingerprints: Sequence[str]) -> str:
    """Of a mixture: depends on its sources and their order."""
    return hashlib.sha256("\n".join(fingerprints).encode("ascii")).hexdigest()


def open_data(config: DataConfig) -> Dataset | MixedDataset:
    """Opens what a `data` section names: data.path (a dataset, or a folder of weighted sources), or data.mixture.

    Raises:
        DataError: one cannot be used, or their tokenizers differ.
    """
    config = resolved(config)
    if not config.mixture:
        return open_dataset(config.path, config.remote())
    opened: list[Dataset] = []
    try:
        opened += (open_dataset(path, config.remote()) for path in config.mixture)
        return MixedDataset(opened)
    except DataError:
        for dataset in opened:
            dataset.close()
        raise


def plan_of(
    dataset: Dataset | MixedDataset,
    config: DataConfig,
    batches: int | Batches,
    before: Sequence[Sequence[Any]] = (),
    number: int | None = None,
) -> Plan | MixedPlan:
    """The plan of opened data.

    Args:
        dataset: from `open_data`.
        config: the same section.
        batches: turn the curriculum's steps into order numbers; the global batch size where it never changes.
        before: the phases that the order had so far, as a cursor's `mixture` has them: what lies before `number` stays
            as it was, and the counts of all sources go on.
        number: the order number from which on `config` holds; None where `before` is all there is.
    """
    if isinstance(dataset, Dataset):
        return Plan.of(dataset, config)
    config = resolved(config)
    plans = [Plan.of(source, config) for source in dataset.datasets]
    phases = [Phase(0, config.weights or (1.0,) * len(plans))]
    if config.curriculum:
        sizes = Batches.constant(batches) if isinstance(batches, int) else batches
        by_number = {_position(sizes, int(step)): tuple(weights) for step, *weights in config.curriculum}
        phases = [Phase(first, by_number[first]) for first in sorted(by_number)]
    if before:
        kept = [Phase(int(first), tuple(map(float, counts))) for first, *counts in before]
        phases = kept if number is None else _gone_on(kept, number, phases)
    return MixedPlan(plans, phases, [str(source.path) for source in dataset.datasets])


def _position(batches: Batches, step: int) -> int:
    """Sequences read before a step; of a step before the order began, none."""
    return batches.position(max(step, batches.begins))


def _gone_on(before: Sequence[Phase], number: int, wanted: Sequence[Phase]) -> list[Phase]:
    """Phases that are `before` below a number and `wanted` from it on; none is added where the weights stay.

    Args:
        before: with slots for weights, which are weights that give the same slots.
    """
    kept = [phase for phase in before if phase.first < number]
    now = next(phase for phase in reversed(wanted) if phase.first <= number)
    if not kept or slots(kept[-1].weights) != slots(now.weights):
        kept.append(Phase(number, now.weights))
    return [*kept, *(phase for phase in wanted if phase.first > number)]
