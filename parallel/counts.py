"""The one exchange of counts before a layer's rows travel: who sends how much to whom, and whether all agree.

A message from one rank to another begins with a header that says where its sender is. Each rank checks every header it
gets against its own, so ranks that are out of step, or run different models, stop before a payload is misread.
"""

# T tokens, K top-k, E experts, L local experts, S ranks of a hop, C chunks, N rows of the local experts

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.wire import HEADER_NUMBERS

_FIELDS = ("exchange", "step", "layer", "tokens sent in chunks", "top-k", "hidden size", "experts", "form of rows")


class OutOfStepError(RuntimeError):
    """Ranks that should be in the same exchange are not."""


class Header(NamedTuple):
    """Where a rank is and what it is about to send. All eight must be the same on all ranks of the group."""

    exchange: int  # exchanges so far
    step: int
    layer: str
    chunks: int
    top_k: int
    hidden: int
    n_experts: int
    form: int

    def numbers(self) -> list[int]:
        """As integers; the layer's name by its checksum."""
        return [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in self]


@dataclass(frozen=True)
class Splits:
    """Rows that one chunk sends to and gets from each rank of one hop."""

    sent: list[int]
    came: list[int]


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: its tokens [start, stop), its splits at each hop, and the rows of each local expert in the end."""

    start: int
    stop: int
    hops: tuple[Splits, ...]
    rows_per_expert: tuple[int, ...]


def chunk_bounds(n_tokens: int, chunks: int) -> list[int]:
    """C + 1 limits of nearly equal runs of tokens."""
    return [n_tokens * c // chunks for c in range(chunks + 1)]


def demands(ids: Tensor, chunks: int, n_ranks: int, n_experts: int, each_choice: bool) -> Tensor:
    """What this rank's tokens ask of each rank.

    Args:
        ids: (T, K) int64 expert numbers.
        each_choice: a row for each choice, not one for each (token, rank) pair.

    Returns:
        (C, n_ranks, 1 + L) int64: rows, and choices of each of the rank's experts.
    """
    n_tokens = ids.shape[0]
    local = n_experts // n_ranks
    bounds = torch.tensor(chunk_bounds(n_tokens, chunks)[1:])
    chunk = torch.bucketize(torch.arange(n_tokens), bounds, right=True).to(ids.device, non_blocking=True)  # (T,)
    choices = ids.new_zeros(chunks * n_experts)
    choices.scatter_add_(0, (chunk[:, None] * n_experts + ids).flatten(), torch.ones_like(ids).flatten())
    by_rank = choices.view(chunks, n_ranks, local)
    if each_choice:
        rows = by_rank.sum(2)
    else:
        member = ids.new_zeros(n_tokens, n_ranks).scatter_(1, ids // local, 1)
        rows = ids.new_zeros(chunks, n_ranks).index_add_(0, chunk, member)
    return torch.cat([rows[..., None], by_rank], dim=2)


def node_rows(ids: Tensor, chunks: int, n_nodes: int, n_experts: int) -> Tensor:
    """(C, n_nodes) int64: (token, node) pairs."""
    return demands(ids, chunks, n_nodes, n_experts, each_choice=False)[..., 0]


def exchange_counts(
    asked: Tensor, first: Tensor | None, hops: Sequence[Communicator], header: Header
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Tells each rank of each hop what will come; no host synchronisation.

    Args:
        asked: (C, n_ranks, 1 + L), see `demands`.
        first: (C, S) rows of the first of two hops; None where there is only one.
        hops: one communicator, or two: between nodes, then inside the node.
        header: this rank's.

    Returns:
        For each hop (2, C, S): rows sent to and got from each of its ranks. (C, L) rows of the local experts.
        For each hop the headers that came, (S, 8).
    """
    own = torch.tensor(header.numbers(), dtype=torch.int64).to(asked.device, non_blocking=True)
    below = asked  # (C, ranks that this rank's rows go to from here on, 1 + L)
    splits, headers = [], []
    for number, hop in enumerate(hops):
        size, chunks = hop.size, below.shape[0]
        last = number == len(hops) - 1
        blocks = below.view(chunks, size, -1)
        rows = blocks[..., 0] if last else first  # (C, S)
        assert rows is not None
        body = torch.cat([rows[..., None], blocks], dim=2).transpose(0, 1).reshape(size, -1)
        ones = [1] * size
        what = "exchange of counts" + ("" if len(hops) == 1 else (" between nodes", " inside the node")[number])
        message = torch.cat([own.expand(size, -1), body], dim=1)
        came = hop.start_all_to_all(message, ones, ones, what).wait()  # (S, 8 + C * (2 + L) or more)
        headers.append(came[:, :HEADER_NUMBERS])
        arrived = came[:, HEADER_NUMBERS:].view(size, chunks, -1)
        splits.append(torch.stack([rows, arrived[..., 0].t()]))
        below = arrived[..., 1:].sum(0).view(chunks, below.shape[1] // size, -1)
    return splits, below[:, 0, 1:], headers


def check_headers(header: Header, came: Sequence[Sequence[int]], members: Sequence[int], own: int) -> None:
    """Compares what every rank said with this rank's own header.

    Args:
        came: the headers, by place in the group. members: the ranks' numbers, for the message. own: this rank's number.

    Raises:
        OutOfStepError: naming both ranks and what differs.
    """
    mine = header.numbers()
    for member, theirs in zip(members, came, strict=True):
        different = [
            f"{name} {their} on rank {member} but {our} on rank {own}"
            for name, their, our in zip(_FIELDS, theirs, mine, strict=True)
            if their != our
        ]
        if different:
            raise OutOfStepError(
                f"ranks {own} and {member} are not in the same exchange (rank {own} is at step {header.step}, layer "
                f"{header.layer or 'without a name'}): {'; '.join(different)}"
            )


def plan(
    n_tokens: int, splits: Sequence[Sequence[Sequence[Sequence[int]]]], rows: Sequence[Sequence[int]]
) -> list[ChunkPlan]:
    """Host numbers to chunk plans: splits[hop] is (2, C, S), rows (C, L)."""
    bounds = chunk_bounds(n_tokens, len(rows))
    return [
        ChunkPlan(
            bounds[c],
            bounds[c + 1],
            tuple(Splits(list(sent[c]), list(came[c])) for sent, came in splits),
            tuple(per_expert),
        )
        for c, per_expert in enumerate(rows)
    ]
