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
from parallel.records import Form, keep, pack, unpack


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

    source: Tensor  # (P,) int64 input row of each record: in order of destination, the rank itself last, then of row
    listing: Tensor  # (P,) int64 records in order of row
    offsets: Tensor  # (T + 1,) int64 where each token's run of `listing` begins


def parcels(ids: Tensor, hop: Hop, n_records: int, fan: int) -> Parcels:
    """Finds the records of input rows.

    Args:
        ids: (M, K) expert numbers; slots whose expert is not behind this hop send nothing.
        n_records: P, known from the counts.
        fan: input rows of one token, next to each other.
    """
    n_rows, size, own = ids.shape[0], hop.communicator.size, hop.communicator.rank
    goal = torch.div(ids - hop.first, hop.block, rounding_mode="floor").long()
    seat = torch.where(goal == own, size - 1, goal - (goal > own).long())  # the others in order, this rank last
    seat = torch.where((goal >= 0) & (goal < size), seat, size)
    member = torch.zeros(n_rows, size + 1, dtype=torch.bool, device=ids.device).scatter_(1, seat, True)[:, :size]
    by_seat = member.t().reshape(-1)  # (S * M,)
    source = torch.nonzero_static(by_seat, size=n_records)[:, 0].remainder_(max(1, n_rows))
    place = (by_seat.cumsum(0) - 1).view(size, n_rows).t().reshape(-1)
    by_row = member.reshape(-1)  # (M * S,)
    listing = place.index_select(0, torch.nonzero_static(by_row, size=n_records)[:, 0])
    n_tokens = n_rows // fan
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(member.reshape(n_tokens, fan * size).sum(1), 0, out=offsets[1:])
    return Parcels(source, listing, offsets)


class Leg:
    """One chunk's way over one hop: out with tokens (forward) or gradients of results (backward), and home again.

    Rows that a rank keeps do not travel: they are copied to the end of the table in which the others arrive, while
    these are under way.

        rank 1 of 3, out:   [from rank 0 | from rank 2 | its own]      home:   [of rank 0 | of rank 2 | its own]

    Args:
        ids: (M, K) expert numbers of the input rows.
        fan: input rows of one token: K where each choice is a row of its own, otherwise 1.
        splits: of this chunk at this hop.
        outward, other: how tokens, and everything else, are written.
    """

    def __init__(self, hop: Hop, ids: Tensor, fan: int, splits: Splits, outward: Form, other: Form) -> None:
        self.hop, self.fan = hop, fan
        self.outward, self.other = outward, other
        self.n_slots = ids.shape[1]
        own = hop.communicator.rank
        self.n_own = splits.sent[own]
        self.sent, self.came = (
            [0 if rank == own else rows for rank, rows in enumerate(each)] for each in (splits.sent, splits.came)
        )
        self.n_sent, self.n_came = sum(self.sent), sum(self.came)
        self.parcels = parcels(ids, hop, self.n_sent + self.n_own, fan)

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> "Coming":
        """Starts the tokens: x (T, D), ids (M, K), weights (M, K) fp32. They come as rows (R, D), ids, weights."""
        source = self.parcels.source
        slots = (ids.index_select(0, source).int(), weights.index_select(0, source).float())
        away = [slot[: self.n_sent] for slot in slots]
        return self._out("dispatch", x, self.outward, away, tuple(slot[self.n_sent :] for slot in slots))

    def send_gradient(self, grad: Tensor) -> "Coming":
        """Starts the gradients (T, D) of results on the way that the tokens took; they come as (R, D)."""
        return self._out("gradient of combine", grad, self.other, [], ())

    def _out(self, what: str, x: Tensor, form: Form, away: list[Tensor], own: tuple[Tensor, ...]) -> "Coming":
        source = self.parcels.source
        token = source if self.fan == 1 else torch.div(source, self.fan, rounding_mode="floor")
        records = pack(x, form, *away, index=token[: self.n_sent])
        coming = self._start(records, (self.sent, self.came), what, form, x, own)
        keep(x, form, coming.table[self.n_came :], token[self.n_sent :])
        return coming

    def send_home(self, rows: Tensor, slots: Tensor | None = None) -> "Coming":
        """Starts results, or gradients of rows (R, D) and of their slots' weights (R, K), on the way back; they come as
        (P, D), and (P, K)."""
        what = "combine" if slots is None else "gradient of dispatch"
        given = [] if slots is None else [slots]
        records = pack(rows[: self.n_came], self.other, *(slot[: self.n_came] for slot in given))
        own = tuple(slot[self.n_came :] for slot in given)
        coming = self._start(records, (self.came, self.sent), what, self.other, rows, own)
        keep(rows[self.n_came :], self.other, coming.table[self.n_sent :])
        return coming

    def _start(
        self,
        records: Tensor,
        splits: tuple[list[int], list[int]],
        what: str,
        form: Form,
        like: Tensor,
        own: tuple[Tensor, ...],
    ) -> "Coming":
        """Starts a transfer into a table with room for this rank's own rows at its end."""
        n_coming = sum(splits[1])
        table = like.new_empty(n_coming + self.n_own, like.shape[1])
        # Rows that need no unpacking come straight into the table.
        ready = not own and not form.scaled and form.dtype == like.dtype
        room = table[:n_coming] if ready else None
        pending = self.hop.communicator.start_all_to_all(records, *splits, self.hop.name + what, room)
        return Coming(pending, form, table, n_coming, own, ready)

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
    """Records under way, how to read them, and what of this rank joins them.

    table: (P, D) or (R, D) in the compute dtype, its first `n_coming` rows for what comes. own: of each trailer, this
    rank's own. ready: what comes is not to be unpacked, it is in the table already.
    """

    pending: Pending
    form: Form
    table: Tensor
    n_coming: int
    own: tuple[Tensor, ...]
    ready: bool

    def wait(self) -> tuple[Tensor, ...]:
        """Rows in the compute dtype, then trailers."""
        came = self.pending.wait()
        if self.ready:
            return (self.table,)
        widths = [(own.shape[1], own.dtype) for own in self.own]
        trailers = unpack(came, self.form, self.table[: self.n_coming], *widths)
        return (self.table, *(torch.cat(both) for both in zip(trailers, self.own, strict=True)))


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
