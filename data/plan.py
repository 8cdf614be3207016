"""The plan: which sequences make up which global batch, and which tokens make up a sequence. A pure function.

    global batch k of size G            order numbers k * G .. k * G + G - 1, counted through all epochs
    order number n, i-th of its epoch   lane i % C, position i // C in that lane
    lane                                a contiguous range of the epoch's sequence ids
    sequence id                         pieces of documents, by the packing ("split" or "best_fit")

Data-parallel rank r of R takes every R-th number of a batch, beginning with r. Every R that divides the batch gives the
same global batches; if it also divides C, a rank reads the same lanes throughout an epoch. The batch at the end of an
epoch goes on with the first numbers of the next one: nothing is dropped, and every rank has the same number of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from data.best_fit import BestFitOrder
from data.config import DataConfig
from data.dataset import Dataset
from data.errors import DataError
from data.split import SplitOrder
from data.windows import Lengths, Piece, PieceTable, Recent

PLAN_VERSION = 1
_BLOCK = 64  # sequences whose pieces are computed together: a lane reads them one after the other


class _Block(NamedTuple):
    """The pieces of _BLOCK neighbouring sequences.

    Attributes: pieces: (n, 4) int64 of (shard, row, start, stop); firsts: the first piece of each, and n at the end.
    """

    pieces: np.ndarray
    firsts: list[int]


class EpochSteps(NamedTuple):
    """What an epoch gives at a global batch size: its sequences, the batches that lie wholly in it when it starts on a
    batch's first place, and the sequences that are then carried over into the next epoch's first batch."""

    n_sequences: int
    steps: int
    carried_over: int


class _Order(Protocol):
    def epoch_start(self, epoch: int) -> int: ...

    def epoch_of(self, sequence: int) -> int: ...

    def table(self, first: int, count: int) -> PieceTable: ...


class Plan:
    """The order of a dataset's sequences.

    Args:
        lengths: lengths of the training documents, by shard (an opened dataset's `train`).
        fingerprint: of the dataset.
        seed, seq_len, packing, lanes, window_shards: as in DataConfig.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        fingerprint: str,
        seed: int,
        seq_len: int,
        packing: str = "split",
        lanes: int = 192,
        window_shards: int = 16,
    ) -> None:
        if int(lengths.shard_tokens.sum()) < 1:
            raise DataError("the dataset holds no tokens; pack it again from more text")
        self.fingerprint, self.seed, self.seq_len = fingerprint, seed, seq_len
        self.packing, self.lanes, self.window_shards = packing, lanes, window_shards
        self.n_shards = len(lengths.shard_tokens)
        order = SplitOrder if packing == "split" else BestFitOrder
        # a batch touches up to `lanes` places of an epoch; one more window each where a sequence crosses a border
        self._order: _Order = order(lengths, seq_len, window_shards, (fingerprint, seed), 2 * lanes)
        self._blocks = Recent(self._compute_block, 2 * lanes)

    @classmethod
    def of(cls, dataset: Dataset, config: DataConfig) -> Plan:
        """The plan of an opened dataset under the `data` section of a configuration."""
        return cls(
            dataset.train,
            fingerprint=dataset.fingerprint,
            seed=config.seed,
            seq_len=config.seq_len,
            packing=config.packing,
            lanes=config.lanes,
            window_shards=config.window_shards,
        )

    def identity(self) -> dict[str, str | int]:
        """Everything that the order depends on."""
        return {
            "plan_version": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "lanes": self.lanes,
            "window_shards": self.window_shards,
        }

    def digest(self) -> str:
        """A short hash of the identity, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode("utf-8")).hexdigest()[:16]

    def epoch_start(self, epoch: int) -> int:
        """The first order number of an epoch, which is also its first sequence id."""
        return self._order.epoch_start(epoch)

    def n_sequences(self, epoch: int = 0) -> int:
        """Sequences of an epoch. Under "split" epochs may differ by one."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    def epoch_of(self, number: int) -> int:
        """The epoch of an order number or a sequence id."""
        return self._order.epoch_of(number)

    def epoch_steps(self, global_batch_size: int, epoch: int = 0) -> EpochSteps:
        """Sequences, whole steps and carried-over sequences of an epoch."""
        n_sequences = self.n_sequences(epoch)
        return EpochSteps(n_sequences, *divmod(n_sequences, global_batch_size))

    def sequence_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Sequence ids (n,) int64 of order numbers (n,) int64, rising; a bijection of every epoch onto itself."""
        ids = np.empty(len(numbers), np.int64)
        done = 0
        while done < len(numbers):
            epoch = self.epoch_of(int(numbers[done]))
            start, stop = self.epoch_start(epoch), self.epoch_start(epoch + 1)
            until = done + int(np.searchsorted(numbers[done:], stop))
            position, lane = np.divmod(numbers[done:until] - start, self.lanes)
            length, longer = divmod(stop - start, self.lanes)  # the first `longer` lanes have one sequence more
            ids[done:until] = start + lane * length + np.minimum(lane, longer) + position
            done = until
        return ids

    def batch(self, step: int, global_batch_size: int) -> np.ndarray:
        """Sequence ids (G,) int64 of global batch `step`, in the order in which ranks share them out."""
        first = step * global_batch_size
        return self.sequence_ids(np.arange(first, first + global_batch_size, dtype=np.int64))

    def pieces(self, sequence: int) -> list[Piece]:
        """The pieces of documents that make up a sequence, in order."""
        return list(map(Piece._make, self.table(np.array([sequence])).by_sequence(1)[0]))

    def table(self, ids: np.ndarray) -> PieceTable:
        """The pieces of sequences (n,), one behind the other, in the order in which they are asked for."""
        blocks, places = np.divmod(ids, _BLOCK)
        found = zip(map(self._blocks.get, blocks.tolist()), places.tolist(), strict=True)
        parts = [pieces[firsts[place] : firsts[place + 1]] for (pieces, firsts), place in found]
        return PieceTable(np.repeat(np.arange(len(parts)), list(map(len, parts))), *np.concatenate(parts).T)

    def parts(self, ids: np.ndarray) -> Iterator[tuple[str, Plan, np.ndarray]]:
        """The sequence ids (n,) of each source by its name; here one source without a name."""
        yield "", self, ids

    def shards_near(self, sequence: int) -> set[int]:
        """The shards of the sequences that are computed together with this one, the next of its lane among them."""
        return set(self._blocks.get(sequence // _BLOCK).pieces[:, 0].tolist())

    def _compute_block(self, block: int) -> _Block:
        table = self._order.table(block * _BLOCK, _BLOCK)
        firsts = np.searchsorted(table.sequence, np.arange(_BLOCK + 1)).tolist()
        pieces = np.empty((len(table.sequence), 4), np.int64)
        for place, column in enumerate(table[1:]):
            pieces[:, place] = column
        return _Block(pieces, firsts)
