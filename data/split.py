"""Packing "split": documents one behind the other, cut every seq_len tokens, each token a target exactly once.

All epochs form one endless row of tokens: epoch 0's documents in its order, then epoch 1's, and so on. Sequence i has
the targets [i * seq_len, (i + 1) * seq_len) of that row; its inputs lie one token further left. The token in front of a
document is always an end token, also at the very start, so nothing is padded, masked or dropped. An epoch owns the
sequences whose first target lies in it; its last one may reach into the next epoch's first document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.order import derive_key, permutation
from data.windows import Grouping, Lengths, PieceTable, Recent, WindowRows, join_tables, window_lengths


class _Epoch(NamedTuple):
    """An epoch's windows, and the tokens in front of each window (n_windows + 1,) int64."""

    grouping: Grouping
    starts: np.ndarray


class _Window(NamedTuple):
    """A window's documents in shuffled order: their numbers (n,), and the tokens up to each one's end (n,) int64."""

    rows: WindowRows
    order: np.ndarray
    ends: np.ndarray


class SplitOrder:
    """The sequences of packing "split", a pure function of lengths and a key.

    Args:
        lengths: the dataset's document lengths.
        seq_len: targets in a sequence.
        window_shards: shards in a window.
        key_parts: what the order depends on besides, for example (fingerprint, seed).
        capacity: windows kept in memory (16 bytes a document).
    """

    def __init__(
        self, lengths: Lengths, seq_len: int, window_shards: int, key_parts: tuple[str | int, ...], capacity: int
    ) -> None:
        self._lengths, self._seq_len, self._window_shards, self._key_parts = lengths, seq_len, window_shards, key_parts
        self._total = int(lengths.shard_tokens.sum())
        self._epochs = Recent(self._compute_epoch, 4)
        self._windows = Recent(self._compute_window, capacity)

    def epoch_start(self, epoch: int) -> int:
        """The first sequence whose first target lies in an epoch, which is also the number of sequences before."""
        return -(-epoch * self._total // self._seq_len)

    def epoch_of(self, sequence: int) -> int:
        """The epoch that owns a sequence."""
        return sequence * self._seq_len // self._total

    def table(self, first: int, count: int) -> PieceTable:
        """The pieces of sequences first .. first + count - 1, seq_len targets in each."""
        at, stop = first * self._seq_len, (first + count) * self._seq_len
        tables = []
        while at < stop:
            epoch, skipped = divmod(at, self._total)
            layout = self._epochs.get(epoch)
            number = int(np.searchsorted(layout.starts, skipped, "right")) - 1
            inside = skipped - int(layout.starts[number])
            taken = min(stop - at, int(layout.starts[number + 1]) - skipped)
            tables.append(self._cut(self._windows.get(epoch, number), inside, inside + taken, at - inside, first))
            at += taken
        return join_tables(tables)

    def _cut(self, window: _Window, start: int, stop: int, origin: int, first: int) -> PieceTable:
        """The pieces of the window's tokens [start, stop), counted inside it; it begins at token `origin` of the row of
        all tokens. A piece ends where a document or a sequence ends."""
        low, high = np.searchsorted(window.ends, (start, stop - 1), "right").tolist()
        document_ends = window.ends[low : high + 1]
        offset = -(origin + start) % self._seq_len
        sequence_ends = np.arange(start + (offset or self._seq_len), stop, self._seq_len)
        ends = np.concatenate((document_ends[:-1], sequence_ends))
        ends.sort()
        if len(ends) > 1:
            ends = ends[np.concatenate(((True,), ends[1:] != ends[:-1]))]  # both ended there
        starts = np.concatenate(((start,), ends))
        ends = np.append(ends, stop)
        position = np.searchsorted(document_ends, starts, "right")
        begins = np.concatenate(((window.ends[low - 1] if low else 0,), document_ends[:-1]))[position]
        shard, row = window.rows.locate(window.order[low + position])
        return PieceTable((origin + starts) // self._seq_len - first, shard, row, starts - begins, ends - begins)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        grouping = Grouping(self._lengths, self._window_shards, derive_key(*self._key_parts, "shards", epoch))
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(grouping.window_tokens)))
        return _Epoch(grouping, starts)

    def _compute_window(self, epoch: int, number: int) -> _Window:
        shards = self._epochs.get(epoch).grouping.windows[number]
        tokens = window_lengths(self._lengths, shards)
        order = permutation(len(tokens), derive_key(*self._key_parts, "documents", epoch, number))
        return _Window(WindowRows(self._lengths, shards), order, np.cumsum(tokens[order]))
