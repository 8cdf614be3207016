"""A slow network between nodes, modelled: transfers over it end no sooner than its latency and bandwidth allow."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from parallel.communicator import Communicator, Pending, Reduction


class Link:
    """One rank's way out of its node, full duplex: transfers follow each other.

    Args:
        gigabits: per second, each way. latency_s: of each transfer.
    """

    def __init__(self, gigabits: float, latency_s: float) -> None:
        self.bytes_per_second = gigabits * 1e9 / 8
        self.latency_s = latency_s
        self.free_at = 0.0

    def book(self, nbytes: int) -> float:
        """When a transfer of so many bytes that sets out now is over, on the clock of time.perf_counter."""
        self.free_at = max(self.free_at, time.perf_counter()) + nbytes / self.bytes_per_second
        return self.free_at + self.latency_s


class SlowCommunicator:
    """A communicator some of whose ranks are on other nodes, behind a modelled link.

    Args:
        inner: carries the data.
        far: for each rank of the group whether it is on another node.
        link: this rank's; shared by all its communicators.
    """

    def __init__(self, inner: Communicator, far: Sequence[bool], link: Link) -> None:
        self.inner, self.far, self.link = inner, list(far), link
        self.rank, self.size, self.traffic = inner.rank, inner.size, inner.traffic
        self.far_bytes = 0

    def start_all_to_all(
        self,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        what: str = "all-to-all",
        room: Tensor | None = None,
    ) -> Pending:
        """The inner transfer, held back until the link has carried what crosses it."""
        row = rows[:1].nbytes or rows.new_empty(1, *rows.shape[1:]).nbytes
        out, came = (
            row * sum(split for split, far in zip(splits, self.far, strict=True) if far)
            for splits in (input_splits, output_splits)
        )
        self.far_bytes += out
        pending = self.inner.start_all_to_all(rows, input_splits, output_splits, what, room)
        return _Held(self, pending, self.link.book(max(out, came)) if any(self.far) else 0.0)

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """The same, waited for."""
        return self.start_all_to_all(rows, input_splits, output_splits).wait()

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Not held back."""
        return self.inner.all_reduce(tensor, op)

    def gather(self, value: Any) -> list[Any]:
        """Not held back."""
        return self.inner.gather(value)

    def barrier(self) -> None:
        """Not held back."""
        self.inner.barrier()


class _Held:
    def __init__(self, owner: SlowCommunicator, pending: Pending, due: float) -> None:
        self._owner, self._pending, self._due = owner, pending, due

    def wait(self) -> Tensor:
        """What came, not before the link is done."""
        rows = self._pending.wait()
        left = self._due - time.perf_counter()
        if left > 0:
            time.sleep(left)
            self._owner.traffic.exposed_seconds += left
            self._owner.traffic.seconds += left
        return rows
