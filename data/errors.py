"""The errors of the data room: what is wrong, where, and what to do about it."""

from __future__ import annotations


class DataError(ValueError):
    """A dataset, a source or a request that cannot be used; the message says what to do instead."""


class DamagedSampleError(DataError):
    """A stored sample whose bytes are not the ones that were packed.

    Attributes: shard (file name), key (sample key or its hash in hex), offset (bytes into the shard).
    """

    def __init__(self, shard: str, key: str, offset: int, problem: str) -> None:
        super().__init__(
            f"{shard}: sample {key} at byte {offset}: {problem}; run `trimtab data verify` on the folder to list every "
            f"damaged sample, then restore the shard or pack the dataset again"
        )
        self.shard, self.key, self.offset, self.problem = shard, key, offset, problem

    def __reduce__(self) -> tuple:
        return type(self), (self.shard, self.key, self.offset, self.problem)
