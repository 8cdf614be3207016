"""How ranks talk: one small interface over nothing, a process group, or (threads.py) virtual ranks.

Everything above this file is written once against `Communicator`; groups come down as arguments, never from globals.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.watch import Wait, Watch

Reduction = Literal["sum", "max", "min"]


_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Traffic:
    """What went through a communicator's all-to-all since the last `reset`.

    seconds: from each transfer's start until what came was taken, added up; transfers that overlap count each.
    exposed_seconds: time that the rank (on a GPU: its compute stream) stood still for them.
    bytes_sent: to other ranks.
    reduce_seconds: time in all-reduces on a CPU, where they block; never reset.
    """

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    bytes_sent: int = 0
    reduce_seconds: float = 0.0
    on_device: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = field(
        default_factory=list, repr=False
    )  # start of a transfer, start of its wait, end of its wait: not read before `reset`, since reading waits

    def reset(self) -> "Traffic":
        """Returns the figures so far and starts again from zero."""
        for began, waited, ended in self.on_device:
            ended.synchronize()
            self.seconds += began.elapsed_time(ended) / 1e3
            self.exposed_seconds += waited.elapsed_time(ended) / 1e3
        past = Traffic(self.seconds, self.exposed_seconds, self.bytes_sent)
        self.seconds, self.exposed_seconds, self.bytes_sent = 0.0, 0.0, 0
        self.on_device.clear()
        return past


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Tensor:
        """What came; to be called once."""
        ...


class Arrived:
    """A transfer that is already over."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        """What came."""
        return self.rows


class Communicator(Protocol):
    """A group of ranks as seen from one of them. Every call is collective: all ranks, same order."""

    rank: int
    size: int
    traffic: Traffic

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Reduces `tensor` over the group in place and returns it."""
        ...

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Sends the next input_splits[g] rows to each rank g; returns what came, in order of rank (no grad)."""
        ...

    def start_all_to_all(
        self,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        what: str = "all-to-all",
        room: Tensor | None = None,
    ) -> Pending:
        """The same, returning before it is over; `what` names it should a rank not come. room: where to put what
        comes, contiguous; None for memory of its own."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's JSON-able value, in order of rank, on every rank."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        ...


class SingleCommunicator:
    """A world of one rank: every collective is the identity."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Returns the tensor as it is."""
        return tensor

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Returns the rows as they are."""
        return rows

    def start_all_to_all(
        self,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        what: str = "all-to-all",
        room: Tensor | None = None,
    ) -> Pending:
        """Returns the rows as they are."""
        return Arrived(rows if room is None else room.copy_(rows))

    def gather(self, value: Any) -> list[Any]:
        """Returns the value alone."""
        return [value]

    def barrier(self) -> None:
        """Returns at once."""


class _Transfer:
    """An all-to-all of a process group under way."""

    def __init__(
        self, work: dist.Work, sent: Tensor, received: Tensor, traffic: Traffic, failed: Callable[..., Exception]
    ) -> None:
        self._work, self._sent, self._received = work, sent, received  # `sent` must live until it is over
        self._traffic, self._failed = traffic, failed
        # No callback tells the true end: Gloo's threads would call into an interpreter that may be on its way out.
        self._started = time.perf_counter()
        if received.is_cuda:
            self._began = _stamp()

    def wait(self) -> Tensor:
        """What came. On a GPU only the current stream waits."""
        waited = time.perf_counter()
        if self._received.is_cuda:
            waits = _stamp()
            self._work.wait()
            self._traffic.on_device.append((self._began, waits, _stamp()))
        else:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self._failed(error, time.perf_counter() - waited) from error
            now = time.perf_counter()
            self._traffic.exposed_seconds += now - waited
            self._traffic.seconds += now - self._started
        return self._received


def _stamp() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class ProcessCommunicator:
    """A torch.distributed process group (NCCL or Gloo).

    Args:
        group: the process group; None means the default one (all ranks).
        watch: tells who is missing when a wait fails.
        traffic: where to count; None for counters of its own.
    """

    def __init__(
        self, group: "dist.ProcessGroup | None" = None, watch: Watch | None = None, traffic: Traffic | None = None
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic() if traffic is None else traffic
        self.watch = Watch() if watch is None else watch
        self.members = dist.get_process_group_ranks(group)
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Reduces in place; a CPU tensor travels through the device when the backend is NCCL."""
        moved = tensor.to(self._device)
        started = time.perf_counter()
        try:
            dist.all_reduce(moved, op=_OPERATIONS[op], group=self.group)
        except RuntimeError as error:
            expected = f"all-reduce of {moved.numel()} numbers"
            raise self._failed(error, time.perf_counter() - started, expected, {}) from error
        if not moved.is_cuda:
            self.traffic.reduce_seconds += time.perf_counter() - started
        if moved is not tensor:
            tensor.copy_(moved)
        return tensor

    def _failed(self, error: Exception, waited_s: float, what: str, expected: dict[int, str]) -> Exception:
        return self.watch.lost(error, Wait(what, self.members, expected, waited_s))

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Uneven and zero splits are exact on both backends; the list form of all_to_all is not, on Gloo."""
        return self.start_all_to_all(rows, input_splits, output_splits).wait()

    def start_all_to_all(
        self,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        what: str = "all-to-all",
        room: Tensor | None = None,
    ) -> Pending:
        """Several may be under way at once; every rank starts them in the same order."""
        received = rows.new_empty((sum(output_splits), *rows.shape[1:])) if room is None else room
        sent = rows.contiguous()
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self.traffic.bytes_sent += (sum(input_splits) - input_splits[self.rank]) * row_bytes

        def failed(error: Exception, waited_s: float) -> Exception:
            return self._failed(error, waited_s, what, _expected(self.members, output_splits, row_bytes))

        started = time.perf_counter()
        try:
            work = dist.all_to_all_single(received, sent, output_splits, input_splits, group=self.group, async_op=True)
        except RuntimeError as error:  # Gloo refuses at once when a connection is already gone
            raise failed(error, time.perf_counter() - started) from error
        assert work is not None
        return _Transfer(work, sent, received, self.traffic, failed)

    def gather(self, value: Any) -> list[Any]:
        """Travels as JSON in a byte tensor, so nothing is ever unpickled."""
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)
        length = torch.tensor([encoded.numel()], dtype=torch.int64, device=self._device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        longest = max(int(one) for one in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: encoded.numel()] = encoded
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.group)
        return [json.loads(bytes(one[: int(size)].cpu().numpy())) for one, size in zip(gathered, lengths, strict=True)]

    def barrier(self) -> None:
        """An all-reduce of one number: it needs no device guess and obeys the group's timeout."""
        self.all_reduce(torch.zeros(1))


def _expected(members: list[int], output_splits: Sequence[int], row_bytes: int) -> dict[int, str]:
    return {member: f"{rows} rows of {row_bytes} bytes" for member, rows in zip(members, output_splits, strict=True)}
