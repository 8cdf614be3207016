"""Windows: shards in shuffled order, taken together in groups inside which documents are shuffled."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from data.order import permutation

Value = TypeVar("Value")


class Lengths(Protocol):
    """What an order needs to know of a dataset: its documents' lengths, by shard.

    Attributes: shard_tokens, shard_documents: (n_shards,) int64.
    """

    shard_tokens: np.ndarray
    shard_documents: np.ndarray

    def document_tokens(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, (n,) int64."""
        ...


class Piece(NamedTuple):
    """The targets [start, stop) of a document, counted in its tokens with the end token. The input in front of target
    t is token t - 1, and the end token in front of a document's first."""

    shard: int
    row: int
    start: int
    stop: int


class PieceTable(NamedTuple):
    """The pieces of n sequences that follow each other, one behind the other.

    Attributes: sequence (place among the n), shard, row, start, stop: (pieces,) int64 each, see Piece.
    """

    sequence: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def by_sequence(self, n: int) -> list[list[tuple[int, int, int, int]]]:
        """The pieces of each of the n sequences, each (shard, row, start, stop)."""
        pieces = list(zip(*(column.tolist() for column in self[1:]), strict=True))
        firsts = np.searchsorted(self.sequence, np.arange(n + 1)).tolist()
        return [pieces[first:stop] for first, stop in pairwise(firsts)]


def join_tables(tables: list[PieceTable]) -> PieceTable:
    """Tables one behind the other."""
    if len(tables) == 1:
        return tables[0]
    return PieceTable(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))


class Grouping:
    """Which shards form which window: shards permuted by a key, `window_shards` of them to a window.

    Attributes: windows (list of tuples of shards), window_tokens: (n_windows,) int64.
    """

    def __init__(self, lengths: Lengths, window_shards: int, key: int) -> None:
        shuffled = permutation(len(lengths.shard_tokens), key).tolist()
        self.windows = [
            tuple(shuffled[start : start + window_shards]) for start in range(0, len(shuffled), window_shards)
        ]
        tokens = lengths.shard_tokens.tolist()
        self.window_tokens = np.array([sum(tokens[shard] for shard in window) for window in self.windows], np.int64)


class WindowRows:
    """Numbers the documents of a window, in shard order, and finds their shard and row again."""

    def __init__(self, lengths: Lengths, shards: tuple[int, ...]) -> None:
        self._shards = np.array(shards, np.int64)
        counts = lengths.shard_documents[self._shards]
        self._firsts = np.cumsum(counts) - counts

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows, (n,) each, of documents' numbers (n,) in the window."""
        positions = np.searchsorted(self._firsts, numbers, "right") - 1
        return self._shards[positions], numbers - self._firsts[positions]


def window_lengths(lengths: Lengths, shards: tuple[int, ...]) -> np.ndarray:
    """Tokens of every document of a window in shard order, (n,) int64."""
    return np.concatenate([lengths.document_tokens(shard) for shard in shards])


class Recent(Generic[Value]):
    """The values of the most recently asked keys, computed on demand. Thread-safe; a value may be computed twice."""

    def __init__(self, compute: Callable[..., Value], capacity: int) -> None:
        self.get: Callable[..., Value] = lru_cache(maxsize=capacity)(compute)
