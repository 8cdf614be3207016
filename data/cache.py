"""Recently read documents, checked once: neighbouring sequences of a lane read the same document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.dataset import Split
from data.errors import DataError

if TYPE_CHECKING:
    from data.mixture import MixedSplit

LARGE_BYTES = 1 << 20
ROW_BITS = 40  # a document's number: its shard, shifted by so much, and its row


class DocumentCache:
    """Serves ranges of documents' bytes from memory, each document behind the end token of the one before it.

    Documents of at most `LARGE_BYTES` are read whole, verified and kept until `capacity_mb` is exceeded; those read
    first go first. Larger ones are verified whole once and then read by range. For one thread, but for `close`.
    """

    def __init__(self, split: Split | MixedSplit, eod_id: int, capacity_mb: int) -> None:
        self._split, self._capacity = split, capacity_mb << 20
        self._eod = np.array(eod_id, split.dtype).tobytes()
        self._kept: dict[int, memoryview] = {}
        self._kept_bytes = 0
        self._verified: set[int] = set()
        self._closed = False

    def parts(self, documents: Sequence[int], lows: Sequence[int], highs: Sequence[int]) -> list[bytes | memoryview]:
        """Bytes [low, high) of each document, counted from the end token in front of it; not compared with the
        vocabulary.

        Args:
            documents: (n,) shard << ROW_BITS | row of each.
            lows, highs: (n,) whole tokens.

        Raises:
            DamagedSampleError: see Split.read_bytes.
            DataError: the cache was closed.
        """
        kept = self._kept
        found: list[bytes | memoryview]
        for document in set(documents).difference(kept, self._verified):
            self._read(document)
        try:
            found = [kept[document][low:high] for document, low, high in zip(documents, lows, highs, strict=True)]
        except KeyError:  # some are large
            found = [self.part(*place) for place in zip(documents, lows, highs, strict=True)]
        while self._kept_bytes > self._capacity and len(kept) > 1:
            self._kept_bytes -= len(kept.pop(next(iter(kept))))
        return found

    def part(self, document: int, low: int, high: int) -> bytes | memoryview:
        """As `parts`, of one document."""
        kept = self._kept.get(document)
        if kept is None and document not in self._verified:
            kept = self._read(document)
        if kept is not None:
            return kept[low:high]
        width = len(self._eod)
        raw = self._split.read_range(*_place(document), max(0, low // width - 1), high // width - 1)
        return raw if low else self._eod + raw

    def close(self) -> None:
        """Lets the reading in another thread end at its next document."""
        self._closed = True

    def _read(self, document: int) -> memoryview:
        """Reads and verifies a document, and keeps it, or only that it was verified."""
        if self._closed:
            raise DataError("the stream was closed while it was read")
        read = memoryview(self._eod + self._split.read_bytes(*_place(document)))
        if len(read) > LARGE_BYTES:
            self._verified.add(document)
        else:
            self._kept[document] = read
            self._kept_bytes += len(read)
        return read


def _place(document: int) -> tuple[int, int]:
    return document >> ROW_BITS, document & ((1 << ROW_BITS) - 1)
