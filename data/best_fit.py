"""Packing "best_fit": documents kept whole where they fit, several to a sequence, the rest padded and masked.

A document longer than seq_len is cut into full pieces and one shorter rest. Inside each window the pieces are placed
by falling length, each into the fullest bin that still has room (best-fit decreasing). Which pieces share a bin is the
same in every epoch: with attention inside documents only it does not matter to the model. Epochs differ in the order of
windows and of bins inside a window, so every epoch has the same, known number of sequences.
Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """A window's pieces and bins; a piece's document, and which pieces are in a bin, are looked up when it is read.

    Attributes:
        rows: finds a document's shard and row.
        tokens: (n_documents,) lengths.
        ends: (n_documents,) the number of pieces up to each document's last.
        by_size: (n_pieces,) numbers of pieces, by rising size.
        first_of_size: the place in `by_size` of the first piece of each size.
        group_starts: (n_groups,) int64 the first bin of each group.
        contents: of each group.
    """

    rows: WindowRows
    tokens: np.ndarray
    ends: np.ndarray
    by_size: np.ndarray
    first_of_size: list[int]
    group_starts: np.ndarray
    contents: list[_Content]

    def members(self, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces' numbers (m,) of bins (n,), one bin behind the other, and each one's place among the bins (m,)."""
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
        return self.by_size[found].astype(np.int64), np.repeat(np.arange(len(bins)), counts)

    def cut(self, pieces: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document number, start and stop, (m,) int64 each, of pieces (m,): full ones first, a document's rest last."""
        documents = np.searchsorted(self.ends, pieces.astype(self.ends.dtype), "right")
        tokens = self.tokens[documents].astype(np.int64)
        place = pieces - (self.ends[documents] - -(-tokens // seq_len))
        return documents, place * seq_len, np.minimum((place + 1) * seq_len, tokens)


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
            documents, begins, stops = window.cut(pieces, self._seq_len)
            tables.append(PieceTable(done + sequence, *window.rows.locate(documents), begins, stops))
            done += taken
        return join_tables(tables)

    def _count(self, shards: tuple[int, ...]) -> int:
        full, histogram = 0, np.zeros(self._seq_len, np.int64)
        for shard in shards:  # one by one: arrays that stay in a core's own cache
            tokens = self._lengths.document_tokens(shard)
            per_document = tokens // self._seq_len
            full += int(per_document.sum())
            histogram += np.bincount(tokens - per_document * self._seq_len, minlength=self._seq_len)
        return full + count_bins(histogram, self._seq_len)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        order = permutation(len(self._n_bins), derive_key(*self._key_parts, "windows", epoch))
        return _Epoch(order, np.concatenate((np.zeros(1, np.int64), np.cumsum(self._n_bins[order]))))

    def _compute_bin_order(self, epoch: int, number: int) -> np.ndarray:
        return permutation(int(self._n_bins[number]), derive_key(*self._key_parts, "bins", epoch, number))

    def _compute_window(self, number: int) -> _Window:
        shards = self._grouping.windows[number]
        tokens = _narrowed(window_lengths(self._lengths, shards), self._seq_len)
        full = tokens // self._seq_len
        n_full = int(full.sum())
        rests = tokens - full * self._seq_len
        with_rest = rests > 0
        full += with_rest
        ends = np.cumsum(full, dtype=np.int64)
        n_pieces = int(ends[-1])
        sizes = np.full(n_pieces, self._seq_len, np.min_scalar_type(self._seq_len))
        sizes[ends[with_rest] - 1] = rests[with_rest]
        # equal lengths are told apart by a shuffle, so that neighbours in a shard do not share a bin by habit
        by_size = permutation(n_pieces, derive_key(*self._key_parts, "pieces", number), sizes, self._seq_len + 1)
        counts = np.bincount(rests, minlength=self._seq_len)  # by size, with those that have no rest at 0
        bins, contents = pack_lengths(counts, self._seq_len)
        counts[0] = 0
        n_bins = np.array([n_full, *bins], np.int64)
        contents.insert(0, [(self._seq_len, 0, 1)])
        first_of_size = [*(np.cumsum(counts) - counts).tolist(), n_pieces - n_full]
        return _Window(
            WindowRows(self._lengths, shards),
            tokens=tokens,
            ends=_narrowed(ends),
            by_size=_narrowed(by_size),
            first_of_size=first_of_size,
            group_starts=np.cumsum(n_bins) - n_bins,
            contents=contents,
        )


def _narrowed(numbers: np.ndarray, other: int = 0) -> np.ndarray:
    """Numbers (n,) in the narrowest unsigned type that holds them and another: windows are kept, so they are small."""
    return numbers.astype(np.min_scalar_type(max(other, int(numbers.max()))))


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
    for size, first, each, room, many in _choices(histogram, capacity):
        left = room - size * each
        if room == capacity:
            if left:
                with_room[left].append(len(n_bins))
            n_bins.append(many)
            contents.append([(size, first, each)])
            continue
        while many:
            index = with_room[room][-1]
            taken = min(many, n_bins[index])
            if taken < n_bins[index]:  # the group's last bins become a group of their own
                n_bins[index] -= taken
                kept = n_bins[index]
                contents.append([(other, start + kept * held, held) for other, start, held in contents[index]])
                index = len(n_bins)
                n_bins.append(taken)
            else:
                with_room[room].pop()
            contents[index].append((size, first, each))
            if left:
                with_room[left].append(index)
            first += taken * each
            many -= taken
    return n_bins, contents


def count_bins(histogram: np.ndarray, capacity: int) -> int:
    """How many bins `pack_lengths` fills, several times faster: bins of equal room need not be told apart."""
    return sum(many for *_, room, many in _choices(histogram, capacity) if room == capacity)


def _choices(histogram: np.ndarray, capacity: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The steps of best-fit decreasing: (size, first, each, room, many) puts the pieces of this size that are numbered
    `first` and on into `many` bins of this room, `each` to a bin; new bins are those of room `capacity`."""
    with_room = [0] * capacity  # bins by room left
    rooms = 0  # bit r is set where a bin has room r: the fullest bin that takes a piece is found at once
    counts = histogram.tolist()
    for size in range(capacity - 1, 0, -1):
        left = counts[size]
        while left:
            fitting = rooms >> size
            if not fitting:
                room, each = capacity, min(capacity // size, left)
                many = left // each
            else:
                room = size + (fitting & -fitting).bit_length() - 1
                each = min(room // size, left)
                many = min(with_room[room], left // each)
                with_room[room] -= many
                if not with_room[room]:
                    rooms ^= 1 << room
            yield size, counts[size] - left, each, room, many
            left -= many * each
            room -= size * each
            if room:
                with_room[room] += many
                rooms |= 1 << room
