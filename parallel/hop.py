"""One hop of a layer's rows to other ranks and back: which rows go where, sent as records, and added up on return.

world 4, two experts a rank, token t chose experts 1, 2 and 3
one hop to ranks 0..3:  t goes to rank 0 (for expert 1) and once to rank 1 (for experts 2 and 3)
"""

# T tokens, M input rows of the hop, K slots of a row, D hidden, S ranks of the hop, P parcels, R rows that came

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.communicator import Communicator, Pending
from parallel.counts import Splits
from parallel.records import Form, pack, unpack


@dataclass(frozen=True)
class Hop:
    """Ranks that a row can go to in one hop.

    first: the number of the first expert behind them. block: experts behind each of them.
    """

    communicator: Communicator
    first: int
    block: int
    name: str = ""


class Parcels(NamedTuple):
    """Which input row each record carries, and where the records of each row are."""

    source: Tensor  # (P,) int64 input row of each record, records in order of destination, then of row
    listing: Tensor  # (P,) int64 records in order of row
    offsets: Tensor  # (T + 1,) int64 where each token's run of `listing` begins


def parcels(ids: Tensor, hop: Hop, n_records: int, fan: int) -> Parcels:
    """Finds the records of input rows.

    Args:
        ids: (M, K) expert numbers; slots whose expert is not behind this hop send nothing.
        n_records: P, known from the counts.
        fan: input rows of one token, next to each other.
    """
    n_rows, size = ids.shape[0], hop.communicator.size
    goal = torch.div(ids - hop.first, hop.block, rounding_mode="floor").long()
    goal = torch.where((goal >= 0) & (goal < size), goal, size)
    member = torch.zeros(n_rows, size + 1, dtype=torch.bool, device=ids.device).scatter_(1, goal, True)[:, :size]
    by_goal = member.t().reshape(-1)  # (S * M,)
    source = torch.nonzero_static(by_goal, size=n_records)[:, 0].remainder_(max(1, n_rows))
    place = (by_goal.cumsum(0) - 1).view(size, n_rows).t().reshape(-1)
    by_row = member.reshape(-1)  # (M * S,)
    listing = place.index_select(0, torch.nonzero_static(by_row, size=n_records)[:, 0])
    n_tokens = n_rows // fan
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(member.reshape(n_tokens, fan * size).sum(1), 0, out=offsets[1:])
    return Parcels(source, listing, offsets)


class Leg:
    """One chunk's way over one hop: out with tokens (forward) or gradients of results (backward), and home again.

    Args:
        ids: (M, K) expert numbers of the input rows.
        fan: input rows of one token: K where each choice is a row of its own, otherwise 1.
        splits: of this chunk at this hop.
        outward, other: how tokens, and everything else, are written.
    """

    def __init__(self, hop: Hop, ids: Tensor, fan: int, splits: Splits, outward: Form, other: Form) -> None:
        self.hop, self.fan, self.splits = hop, fan, splits
        self.outward, self.other = outward, other
        self.n_slots = ids.shape[1]
        self.parcels = parcels(ids, hop, sum(splits.sent), fan)

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, D) -> (P, D) in the dtype of the wire, where casting before copying is cheaper."""
        source = self.parcels.source
        token = source if self.fan == 1 else torch.div(source, self.fan, rounding_mode="floor")
        return x.to(dtype).index_select(0, token)

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> "Coming":
        """Starts the tokens: x (T, D), ids (M, K), weights (M, K) fp32. They come as rows, ids, weights."""
        source = self.parcels.source
        rows = self._rows(x, x.dtype if self.outward.scaled else self.outward.dtype)
        slots = (ids.index_select(0, source).int(), weights.index_select(0, source).float())
        records = pack(rows, self.outward, *slots)
        trailers = ((self.n_slots, torch.int32), (self.n_slots, torch.float32))
        return self._start(records, "dispatch", self.outward, x, *trailers)

    def send_gradient(self, grad: Tensor) -> "Coming":
        """Starts the gradients (T, D) of results on the way that the tokens took."""
        return self._start(
            pack(self._rows(grad, self.other.dtype), self.other), "gradient of combine", self.other, grad
        )

    def _start(
        self, records: Tensor, what: str, form: Form, like: Tensor, *trailers: tuple[int, torch.dtype]
    ) -> "Coming":
        pending = self.hop.communicator.start_all_to_all(
            records, self.splits.sent, self.splits.came, self.hop.name + what
        )
        return Coming(pending, form, like.shape[1], like.dtype, trailers)

    def send_home(self, rows: Tensor, slots: Tensor | None = None) -> "Coming":
        """Starts results, or gradients of rows (R, D) and of their slots' weights (R, K), on the way back."""
        what = "combine" if slots is None else "gradient of dispatch"
        records = pack(rows, self.other, *(() if slots is None else (slots,)))
        trailers = () if slots is None else ((self.n_slots, torch.float32),)
        pending = self.hop.communicator.start_all_to_all(
            records, self.splits.came, self.splits.sent, self.hop.name + what
        )
        return Coming(pending, self.other, rows.shape[1], rows.dtype, trailers)

    def add_up(self, rows: Tensor) -> Tensor:
        """(P, D) that came home -> (T, D), the sum of each token's records, in fp32."""
        return bag_sum(rows, self.parcels.listing, self.parcels.offsets)

    def add_up_slots(self, slots: Tensor) -> Tensor:
        """(P, K) -> (M, K): a slot's gradient is in one record and zero in the row's others."""
        if self.fan > 1:
            return slots.index_select(0, self.parcels.listing)
        return bag_sum(slots.contiguous(), self.parcels.listing, self.parcels.offsets)


@dataclass(frozen=True)
class Coming:
    """Records under way, and how to read them."""

    pending: Pending
    form: Form
    hidden: int
    dtype: torch.dtype
    trailers: tuple[tuple[int, torch.dtype], ...]

    def wait(self) -> tuple[Tensor, ...]:
        """Rows in the compute dtype, then trailers."""
        return unpack(self.pending.wait(), self.form, self.hidden, self.dtype, *self.trailers)


def bag_sum(rows: Tensor, listing: Tensor, offsets: Tensor) -> Tensor:
    """Sums of runs: out[t] = sum of rows[listing[i]] for i in offsets[t] .. offsets[t+1] - 1, in fp32 inside.

    Args:
        rows: (P, D). listing: (P,) int64. offsets: (T + 1,) int64.

    Returns:
        (T, D) in rows' dtype; zero for an empty run.
    """
    if not rows.shape[0]:
        return rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    # A bag adds in fp32 on a GPU whatever the rows are, but not on a CPU.
    table = rows if rows.is_cuda or rows.dtype == torch.float64 else rows.float()
    return F.embedding_bag(listing, table, offsets, mode="sum", include_last_offset=True).to(rows.dtype)
