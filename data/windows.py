"""Windows: shards in shuffled order, taken together in groups inside which documents are shuffled."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
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
        self._shards = shards
        counts = [int(lengths.shard_documents[shard]) for shard in shards]
        self._firsts = [sum(counts[:position]) for position in range(len(counts))]
        self.n_documents = sum(counts)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row) of a document's number in the window."""
        position = bisect_right(self._firsts, number) - 1
        return self._shards[position], number - self._firsts[position]


def window_lengths(lengths: Lengths, shards: tuple[int, ...]) -> np.ndarray:
    """Tokens of every document of a window in shard order, (n,) int64."""
    return np.concatenate([lengths.document_tokens(shard) for shard in shards])


class Recent(Generic[Value]):
    """The values of the most recently asked keys, computed on demand. Thread-safe; a value may be computed twice."""

    def __init__(self, compute: Callable[..., Value], capacity: int) -> None:
        self._compute, self._capacity = compute, capacity
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, *key: int) -> Value:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._compute(*key)
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)
        return value
