"""Recently read documents, checked once: neighbouring sequences of a lane read the same document many times."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from data.dataset import Split

LARGE_BYTES = 1 << 20


class DocumentCache:
    """Serves ranges of documents' tokens from memory.

    Documents of at most `LARGE_BYTES` are read whole, verified and kept until `capacity_mb` is exceeded. Larger ones
    are verified whole once and then read by range. Thread-safe.
    """

    def __init__(self, split: Split, capacity_mb: int) -> None:
        self._split, self._capacity = split, capacity_mb << 20
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept_bytes = 0
        self._verified: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def tokens(self, shard: int, row: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, of the stored dtype, read-only.

        Raises:
            DamagedSampleError: see Split.read.
        """
        with self._lock:
            document = self._kept.get((shard, row))
            if document is not None:
                self._kept.move_to_end((shard, row))
                return document[start:stop]
        if (shard, row) in self._verified:
            return self._split.read_range(shard, row, start, stop)
        document = self._split.read(shard, row)
        with self._lock:
            if document.nbytes > LARGE_BYTES:
                self._verified.add((shard, row))
            elif (shard, row) not in self._kept:
                self._kept[shard, row] = document
                self._kept_bytes += document.nbytes
                while self._kept_bytes > self._capacity and len(self._kept) > 1:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return document[start:stop]
