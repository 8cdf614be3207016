"""How ranks talk: one small interface over nothing, a process group, or (threads.py) virtual ranks.

Everything above this file is written once against `Communicator`; groups come down as arguments, never from globals.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "max", "min"]


_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Traffic:
    """What went through a communicator's all-to-all since the last `reset`: wall seconds and bytes sent elsewhere."""

    seconds: float = 0.0
    bytes_sent: int = 0

    def reset(self) -> "Traffic":
        """Returns the figures so far and starts again from zero."""
        past = Traffic(self.seconds, self.bytes_sent)
        self.seconds, self.bytes_sent = 0.0, 0
        return past


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

    def gather(self, value: Any) -> list[Any]:
        """Returns the value alone."""
        return [value]

    def barrier(self) -> None:
        """Returns at once."""


class ProcessCommunicator:
    """A torch.distributed process group (NCCL or Gloo).

    Args:
        group: the process group; None means the default one (all ranks).
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """Reduces in place; a CPU tensor travels through the device when the backend is NCCL."""
        moved = tensor.to(self._device)
        dist.all_reduce(moved, op=_OPERATIONS[op], group=self.group)
        if moved is not tensor:
            tensor.copy_(moved)
        return tensor

    def all_to_all(self, rows: Tensor, input_splits: list[int], output_splits: list[int]) -> Tensor:
        """Uneven and zero splits are exact on both backends; the list form of all_to_all is not, on Gloo."""
        received = rows.new_empty((sum(output_splits), *rows.shape[1:]))
        started = time.perf_counter()
        dist.all_to_all_single(received, rows.contiguous(), output_splits, input_splits, group=self.group)
        if rows.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.traffic.seconds += time.perf_counter() - started
        elsewhere = sum(input_splits) - input_splits[self.rank]
        self.traffic.bytes_sent += elsewhere * rows.element_size() * rows[:1].numel()
        return received

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
