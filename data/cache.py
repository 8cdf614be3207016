"""Recently read documents, checked once: neighbouring sequences of a lane read the same document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data.dataset import Split

if TYPE_CHECKING:
    from data.mixture import MixedSplit

LARGE_BYTES = 1 << 20


class DocumentCache:
    """Serves ranges of documents' tokens from memory. For one thread.

    Documents of at most `LARGE_BYTES` are read whole, verified and kept until `capacity_mb` is exceeded; those read
    first go first. Larger ones are verified whole once and then read by range.
    """

    def __init__(self, split: Split | MixedSplit, capacity_mb: int) -> None:
        self._split, self._capacity = split, capacity_mb << 20
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._kept_bytes = 0
        self._verified: set[tuple[int, int]] = set()

    def tokens(self, shard: int, row: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, of the stored dtype, read-only; not compared with the vocabulary.

        Raises:
            DamagedSampleError: see Split.read.
        """
        document = self._kept.get((shard, row))
        if document is not None:
            return document[start:stop]
        if (shard, row) in self._verified:
            return self._split.read_range(shard, row, start, stop)
        document = self._split.read(shard, row, in_vocabulary=False)
        if document.nbytes > LARGE_BYTES:
            self._verified.add((shard, row))
        else:
            self._kept[shard, row] = document
            self._kept_bytes += document.nbytes
            while self._kept_bytes > self._capacity and len(self._kept) > 1:
                self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return document[start:stop]
