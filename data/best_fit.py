"""Packing "best_fit": documents kept whole where they fit, several to a sequence, the rest padded and masked.

A document longer than seq_len is cut into full pieces and one shorter rest. Inside each window the pieces are placed
by falling length, each into the fullest bin that still has room (best-fit decreasing). Which pieces share a bin is the
same in every epoch: with attention inside documents only it does not matter to the model. Epochs differ in the order of
windows and of bins inside a window, so every epoch has the same, known number of sequences.
Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from data.order import derive_key, permutation
from data.windows import Grouping, Lengths, Piece, Recent, WindowRows, window_lengths


class _Group(NamedTuple):
    """Bins of equal content: how many, and the (length, pieces of it in each bin) that they hold."""

    n_bins: int
    content: tuple[tuple[int, int], ...]


class _Epoch(NamedTuple):
    """The order of an epoch's windows (n_windows,) and the bins in front of each place (n_windows + 1,) int64."""

    order: np.ndarray
    starts: np.ndarray


class _Window(NamedTuple):
    """A window's pieces and bins: pieces (n, 3) int64 of (document number, start, stop); bin b holds the pieces
    numbered members[firsts[b]:firsts[b + 1]]."""

    rows: WindowRows
    pieces: np.ndarray
    members: np.ndarray
    firsts: np.ndarray


class BestFitOrder:
    """The sequences of packing "best_fit", a pure function of lengths and a key. Arguments as for SplitOrder."""

    def __init__(
        self, lengths: Lengths, seq_len: int, window_shards: int, key_parts: tuple[str | int, ...], capacity: int
    ) -> None:
        self._lengths, self._seq_len, self._key_parts = lengths, seq_len, key_parts
        self._grouping = Grouping(lengths, window_shards, derive_key(*key_parts, "shards"))
        self._n_bins = np.array([self._count(window) for window in self._grouping.windows], np.int64)
        self._total = int(self._n_bins.sum())
        self._epochs = Recent(self._compute_epoch, 4)
        self._windows = Recent(self._compute_window, capacity)
        self._bin_orders = Recent(self._compute_bin_order, capacity)

    def epoch_start(self, epoch: int) -> int:
        """The number of sequences before an epoch."""
        return epoch * self._total

    def epoch_of(self, sequence: int) -> int:
        """The epoch that owns a sequence."""
        return sequence // self._total

    def pieces(self, sequence: int) -> list[Piece]:
        """The pieces of documents that make up a sequence, at most seq_len targets in all."""
        epoch, position = divmod(sequence, self._total)
        layout = self._epochs.get(epoch)
        place = int(np.searchsorted(layout.starts, position, "right")) - 1
        number = int(layout.order[place])
        window = self._windows.get(number)
        chosen = int(self._bin_orders.get(epoch, number)[position - int(layout.starts[place])])
        members = window.members[int(window.firsts[chosen]) : int(window.firsts[chosen + 1])]
        return [
            Piece(*window.rows.locate(document), start, stop)
            for document, start, stop in window.pieces[members].tolist()
        ]

    def _count(self, shards: tuple[int, ...]) -> int:
        tokens = window_lengths(self._lengths, shards)
        rests = tokens % self._seq_len
        groups = pack_lengths(np.bincount(rests, minlength=self._seq_len), self._seq_len)
        return int((tokens // self._seq_len).sum()) + sum(group.n_bins for group in groups)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        order = permutation(len(self._n_bins), derive_key(*self._key_parts, "windows", epoch))
        return _Epoch(order, np.concatenate((np.zeros(1, np.int64), np.cumsum(self._n_bins[order]))))

    def _compute_bin_order(self, epoch: int, number: int) -> np.ndarray:
        return permutation(int(self._n_bins[number]), derive_key(*self._key_parts, "bins", epoch, number))

    def _compute_window(self, number: int) -> _Window:
        shards = self._grouping.windows[number]
        tokens = window_lengths(self._lengths, shards)
        pieces = _cut(tokens, self._seq_len)
        sizes = pieces[:, 2] - pieces[:, 1]
        # equal lengths are told apart by a shuffle, so that neighbours in a shard do not share a bin by habit
        shuffled = permutation(len(pieces), derive_key(*self._key_parts, "pieces", number))
        by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
        first_of_size = np.searchsorted(sizes[by_size], np.arange(self._seq_len + 2))
        full = by_size[first_of_size[self._seq_len] :]
        members, counts = [full], [np.ones(len(full), np.int64)]
        taken = first_of_size.copy()
        for group in pack_lengths(np.bincount(tokens % self._seq_len, minlength=self._seq_len), self._seq_len):
            columns = []
            for size, each in group.content:
                stop = taken[size] + group.n_bins * each
                columns.append(by_size[taken[size] : stop].reshape(group.n_bins, each))
                taken[size] = stop
            table = np.concatenate(columns, axis=1)
            members.append(table.ravel())
            counts.append(np.full(group.n_bins, table.shape[1], np.int64))
        firsts = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))))
        return _Window(WindowRows(self._lengths, shards), pieces, np.concatenate(members), firsts)


def pack_lengths(histogram: np.ndarray, capacity: int) -> list[_Group]:
    """Best-fit decreasing on counts: places all pieces without looking at single ones.

    Args:
        histogram: (capacity,) pieces of each length 0 .. capacity - 1; length 0 is ignored.
        capacity: size of a bin.

    Returns:
        Groups of equal bins. The pieces of a length are to be handed out in the order of the groups.
    """
    groups: list[_Group] = []
    rooms: list[tuple[int, int]] = []  # (room left, index into groups), sorted
    for size in range(capacity - 1, 0, -1):
        left = int(histogram[size])
        while left:
            at = bisect_left(rooms, (size, -1))
            if at == len(rooms):
                each = min(capacity // size, left)
                n_bins = left // each
                groups.append(_Group(n_bins, ((size, each),)))
                insort(rooms, (capacity - size * each, len(groups) - 1))
                left -= n_bins * each
                continue
            room, index = rooms.pop(at)
            group = groups[index]
            each = min(room // size, left)
            n_bins = min(group.n_bins, left // each)
            if n_bins < group.n_bins:
                groups.append(_Group(group.n_bins - n_bins, group.content))
                insort(rooms, (room, len(groups) - 1))
            groups[index] = _Group(n_bins, (*group.content, (size, each)))
            insort(rooms, (room - size * each, index))
            left -= n_bins * each
    return groups


def _cut(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Cuts documents (n,) into full pieces and rests: (pieces, 3) int64 of (document number, start, stop)."""
    per_document = -(-tokens // seq_len)
    documents = np.repeat(np.arange(len(tokens)), per_document)
    firsts = np.cumsum(per_document) - per_document
    starts = (np.arange(len(documents)) - firsts[documents]) * seq_len
    return np.stack((documents, starts, np.minimum(starts + seq_len, tokens[documents])), axis=1)
