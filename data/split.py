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
from data.windows import Grouping, Lengths, Piece, Recent, WindowRows, window_lengths


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

    def pieces(self, sequence: int) -> list[Piece]:
        """The pieces of documents that make up a sequence, seq_len targets in all."""
        epoch, skipped = divmod(sequence * self._seq_len, self._total)
        wanted = self._seq_len
        found: list[Piece] = []
        layout = self._epochs.get(epoch)
        number = int(np.searchsorted(layout.starts, skipped, "right")) - 1
        window = self._windows.get(epoch, number)
        inside = skipped - int(layout.starts[number])
        position = int(np.searchsorted(window.ends, inside, "right"))
        start = inside - (int(window.ends[position - 1]) if position else 0)
        while True:
            end = int(window.ends[position]) - (int(window.ends[position - 1]) if position else 0)
            stop = min(end, start + wanted)
            if stop > start:
                found.append(Piece(*window.rows.locate(int(window.order[position])), start, stop))
                wanted -= stop - start
            if wanted == 0:
                return found
            start, position = 0, position + 1
            while position == len(window.ends):
                position, number = 0, number + 1
                if number == len(layout.grouping.windows):
                    number, epoch = 0, epoch + 1
                    layout = self._epochs.get(epoch)
                window = self._windows.get(epoch, number)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        grouping = Grouping(self._lengths, self._window_shards, derive_key(*self._key_parts, "shards", epoch))
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(grouping.window_tokens)))
        return _Epoch(grouping, starts)

    def _compute_window(self, epoch: int, number: int) -> _Window:
        shards = self._epochs.get(epoch).grouping.windows[number]
        tokens = window_lengths(self._lengths, shards)
        order = permutation(len(tokens), derive_key(*self._key_parts, "documents", epoch, number))
        return _Window(WindowRows(self._lengths, shards), order, np.cumsum(tokens[order]))
