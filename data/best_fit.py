"""Packing "best_fit": documents kept whole where they fit, several to a sequence, the rest padded and masked.

A document longer than seq_len is cut into full pieces and one shorter rest. Inside each window the pieces are placed
by falling length, each into the fullest bin that still has room (best-fit decreasing). Which pieces share a bin is the
same in every epoch: with attention inside documents only it does not matter to the model. Epochs differ in the order of
windows and of bins inside a window, so every epoch has the same, known number of sequences.
Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.order import derive_key, permutation
from data.windows import Grouping, Lengths, PieceTable, Recent, WindowRows, join_tables, window_lengths

# (size, first, each): bin b of a group of equal bins holds the pieces of this size numbered first + b * each and on,
# `each` of them
_Content = list[tuple[int, int, int]]


class _Epoch(NamedTuple):
    """The order of an epoch's windows (n_windows,) and the bins in front of each place (n_windows + 1,) int64."""

    order: np.ndarray
    starts: np.ndarray


class _Window(NamedTuple):
    """A window's pieces and bins; which pieces are in a bin is looked up when it is read.

    Attributes:
        rows: finds a document's shard and row.
        pieces: (n, 3) int64 of (document number, start, stop), by rising size.
        first_of_size: the number of the first piece of each size.
        group_starts: (n_groups,) int64 the first bin of each group.
        contents: of each group.
    """

    rows: WindowRows
    pieces: np.ndarray
    first_of_size: list[int]
    group_starts: np.ndarray
    contents: list[_Content]

    def members(self, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces (m, 3) of bins (n,), one bin behind the other, and the place (m,) among the bins of each."""
        found: list[int] = []
        counts = []
        groups = np.searchsorted(self.group_starts, bins, "right") - 1
        inside = bins - self.group_starts[groups]
        for group, number in zip(groups.tolist(), inside.tolist(), strict=True):
            before = len(found)
            for size, first, each in self.contents[group]:
                start = self.first_of_size[size] + first + number * each
                found += range(start, start + each)
            counts.append(len(found) - before)
        return self.pieces[found], np.repeat(np.arange(len(bins)), counts)


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

    def table(self, first: int, count: int) -> PieceTable:
        """The pieces of sequences first .. first + count - 1, at most seq_len targets in each."""
        tables, done = [], 0
        while done < count:
            epoch, position = divmod(first + done, self._total)
            layout = self._epochs.get(epoch)
            place = int(np.searchsorted(layout.starts, position, "right")) - 1
            number, start = int(layout.order[place]), int(layout.starts[place])
            taken = min(count - done, int(layout.starts[place + 1]) - position)
            window = self._windows.get(number)
            chosen = self._bin_orders.get(epoch, number)[position - start : position - start + taken]
            pieces, sequence = window.members(chosen)
            tables.append(PieceTable(done + sequence, *window.rows.locate(pieces[:, 0]), pieces[:, 1], pieces[:, 2]))
            done += taken
        return join_tables(tables)

    def _count(self, shards: tuple[int, ...]) -> int:
        tokens = window_lengths(self._lengths, shards)
        rests = tokens % self._seq_len
        full = int((tokens // self._seq_len).sum())
        return full + count_bins(np.bincount(rests, minlength=self._seq_len), self._seq_len)

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
        narrow = np.uint16 if self._seq_len < 1 << 16 else np.int64  # 16 bits are sorted by radix, ten times faster
        by_size = shuffled[np.argsort(sizes[shuffled].astype(narrow), kind="stable")]
        counts = np.bincount(sizes, minlength=self._seq_len + 1)
        rests = np.bincount(tokens % self._seq_len, minlength=self._seq_len)
        bins, contents = pack_lengths(rests, self._seq_len)
        n_bins = np.array([counts[self._seq_len], *bins], np.int64)
        contents.insert(0, [(self._seq_len, 0, 1)])
        rows = WindowRows(self._lengths, shards)
        first_of_size = (np.cumsum(counts) - counts).tolist()
        return _Window(rows, pieces[by_size], first_of_size, np.cumsum(n_bins) - n_bins, contents)


def pack_lengths(histogram: np.ndarray, capacity: int) -> tuple[list[int], list[_Content]]:
    """Best-fit decreasing on counts: places all pieces without looking at single ones.

    Args:
        histogram: (capacity,) pieces of each length 0 .. capacity - 1; length 0 is ignored.
        capacity: size of a bin.

    Returns:
        Groups of equal bins: how many bins each has, and what is in them. Each piece is in exactly one bin.
    """
    n_bins: list[int] = []  # by group
    contents: list[_Content] = []
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # groups by room left; full ones are in none
    rooms = 0  # bit r is set where a group has room r: the fullest bin that takes a piece is found at once
    counts = histogram.tolist()
    for size in range(capacity - 1, 0, -1):
        left = counts[size]
        while left:
            fitting = rooms >> size
            if not fitting:
                each = min(capacity // size, left)
                index, room = len(n_bins), capacity
                n_bins.append(left // each)
                contents.append([])
            else:
                room = size + (fitting & -fitting).bit_length() - 1
                index = with_room[room][-1]
                each = min(room // size, left)
                taken = left // each
                if taken < n_bins[index]:  # the group's last bins become a group of their own
                    n_bins[index] -= taken
                    kept = n_bins[index]
                    contents.append([(other, first + kept * many, many) for other, first, many in contents[index]])
                    index = len(n_bins)
                    n_bins.append(taken)
                else:
                    with_room[room].pop()
                    if not with_room[room]:
                        rooms ^= 1 << room
            contents[index].append((size, counts[size] - left, each))
            left -= n_bins[index] * each
            room -= size * each
            if room:
                with_room[room].append(index)
                rooms |= 1 << room
    return n_bins, contents


def count_bins(histogram: np.ndarray, capacity: int) -> int:
    """How many bins `pack_lengths` fills, several times faster: bins of equal room need not be told apart."""
    with_room = [0] * capacity
    rooms = total = 0
    counts = histogram.tolist()
    for size in range(capacity - 1, 0, -1):
        left = counts[size]
        while left:
            fitting = rooms >> size
            if not fitting:
                room, each = capacity, min(capacity // size, left)
                n_bins = left // each
                total += n_bins
            else:
                room = size + (fitting & -fitting).bit_length() - 1
                each = min(room // size, left)
                n_bins = min(with_room[room], left // each)
                with_room[room] -= n_bins
                if not with_room[room]:
                    rooms ^= 1 << room
            left -= n_bins * each
            room -= size * each
            if room:
                with_room[room] += n_bins
                rooms |= 1 << room
    return total


def _cut(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Cuts documents (n,) into full pieces and rests: (pieces, 3) int64 of (document number, start, stop)."""
    per_document = -(-tokens // seq_len)
    documents = np.repeat(np.arange(len(tokens)), per_document)
    firsts = np.cumsum(per_document) - per_document
    starts = (np.arange(len(documents)) - firsts[documents]) * seq_len
    return np.stack((documents, starts, np.minimum(starts + seq_len, tokens[documents])), axis=1)
