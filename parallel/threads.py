"""Virtual ranks: threads of one process that exchange tensors through shared slots.

For debugging: the true expert-parallel path, in one process, with a breakpoint anywhere. Sums run in order of rank, so
they are deterministic.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.products import settle_mkl
from parallel.communicator import Arrived, Pending, Reduction, Traffic


class ThreadGroup:
    """What the threads of one group share: a slot for each rank and a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.gate = threading.Barrier(size)


class ThreadCommunicator:
    """One virtual rank's view of a `ThreadGroup`.

    A rank that fails breaks the group's gate, and every other rank leaves its wait with `threading.BrokenBarrierError`.
    """

    def __init__(self, group: ThreadGroup, rank: int, traffic: Traffic | None = None) -> None:
        self.group = group
        self.rank = rank
        self.size = group.size
        self.traffic = Traffic() if traffic is None else traffic

    def _swap(self, value: Any, read: Callable[[list[Any]], Any]) -> Any:
        """Shows `value` to the group, lets `read` look at all slots, and leaves when everybody has looked."""
        self.group.slots[self.rank] = value
        self.group.gate.wait()
        seen = read(self.group.slots)
        self.group.gate.wait()
        self.group.slots[self.rank] = None  # everybody has looked: do not keep it alive
        return seen

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Reduces in place, always in order of rank."""

        def reduce(slots: list[Tensor]) -> Tensor:
            total = slots[0].clone()
            for other in slots[1:]:
                if op == "sum":
                    total += other
                elif op == "max":
                    total = torch.maximum(total, other)
                else:
                    total = torch.minimum(total, other)
            return total

        reduced = self._swap(tensor.detach(), reduce)
        with torch.no_grad():
            tensor.copy_(reduced)
        return tensor

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Copies from every rank's rows the run that is addressed to this rank."""
        started = time.perf_counter()

        def collect(slots: list[tuple[Tensor, list[int]]]) -> Tensor:
            parts = []
            for source, (sent, splits) in enumerate(slots):
                if splits[self.rank] != output_splits[source]:
                    raise RuntimeError(
                        f"virtual rank {source} sends {splits[self.rank]} rows to rank {self.rank}, "
                        f"which expects {output_splits[source]}"
                    )
                first = sum(splits[: self.rank])
                parts.append(sent[first : first + splits[self.rank]])
            return torch.cat(parts)

        received = self._swap((rows.detach(), list(input_splits)), collect)
        seconds = time.perf_counter() - started
        self.traffic.seconds += seconds
        self.traffic.exposed_seconds += seconds
        elsewhere = sum(input_splits) - input_splits[self.rank]
        self.traffic.bytes_sent += elsewhere * rows.element_size() * math.prod(rows.shape[1:])
        return received

    def start_all_to_all(
        self,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        what: str = "all-to-all",
        room: Tensor | None = None,
    ) -> Pending:
        """Done when it returns: a thread has nobody to do it meanwhile."""
        came = self.all_to_all(rows, input_splits, output_splits)
        return Arrived(came if room is None else room.copy_(came))

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value."""
        return self._swap(value, list)

    def barrier(self) -> None:
        """Waits for every rank of the group."""
        self.group.gate.wait()


class VirtualWorld:
    """The shared groups of `size` virtual ranks; makes the same `ThreadGroup` for the same set of ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._groups: dict[tuple[int, ...], ThreadGroup] = {}
        self._lock = threading.Lock()

    def communicator(self, ranks: list[int], rank: int, traffic: Traffic | None = None) -> ThreadCommunicator:
        """The view that world rank `rank` has of the group made of the world ranks `ranks`; `traffic`: where to count,
        None for counters of its own."""
        with self._lock:
            group = self._groups.setdefault(tuple(ranks), ThreadGroup(len(ranks)))
        return ThreadCommunicator(group, ranks.index(rank), traffic)

    def abort(self) -> None:
        """Breaks every wait: called once a rank has failed."""
        with self._lock:
            for group in self._groups.values():
                group.gate.abort()


def run_virtual_ranks(size: int, work: Callable[[VirtualWorld, int], Any]) -> list[Any]:
    """Runs `work(world, rank)` for every virtual rank, rank 0 in the calling thread so that a debugger feels at home.

    Returns:
        The results in order of rank.

    Raises:
        The first error that a rank raised of its own; errors that only follow from a broken wait are left out.
    """
    settle_mkl()
    world = VirtualWorld(size)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []
    consequences: list[tuple[int, BaseException]] = []

    def play(rank: int) -> None:
        try:
            # Backward on the calling thread: a device's single backward thread would wait for itself at a collective.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = work(world, rank)
        except threading.BrokenBarrierError as broken:
            consequences.append((rank, broken))
        except BaseException as error:  # noqa: BLE001 - every failure must free the other ranks, and is raised below
            failures.append((rank, error))
            world.abort()

    others = [threading.Thread(target=play, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(1, size)]
    for thread in others:
        thread.start()
    play(0)
    for thread in others:
        thread.join()
    if failures or consequences:
        rank, error = (failures + consequences)[0]
        error.add_note(f"raised by virtual rank {rank} of {size}")
        raise error
    return results
