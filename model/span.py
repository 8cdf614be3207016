"""Which tokens one cached forward adds: rows of the cache, positions, who sees whom, and the way to a padded block."""

# N tokens of the forward (packed, row by row), R rows in it, S tokens of its longest row, T slots looked at

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Span:
    """counts[i] tokens of cache row rows[i], the first at position starts[i].

    All that works on single tokens works on the N packed ones, so that padding is computed in attention only, where
    its result is thrown away.

    Attributes:
        longest: S. reach: T, the last position of any row plus 1.
        fresh: no row has earlier tokens. even: all rows have S tokens. level: all rows start at the same position.
        whole: the rows are all of the cache's, in order.
        positions, cache_rows: (N,) int64.
        mask: (R, S, T) fp32, 0 where a query sees a slot and minus infinity elsewhere; None where all see all.
    """

    def __init__(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        n_cache_rows: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.rows, self.starts, self.counts = list(rows), list(starts), list(counts)
        self.n_rows, self.longest = len(self.rows), max(self.counts)
        self.reach = max(start + count for start, count in zip(starts, counts, strict=True))
        self.fresh = not any(self.starts)
        self.even = min(self.counts) == self.longest
        self.level = min(self.starts) == max(self.starts)
        self.whole = self.rows == list(range(n_cache_rows))
        if self.longest == 1:
            positions, in_span = self.starts, list(range(self.n_rows))
        else:
            positions = [start + j for start, count in zip(starts, counts, strict=True) for j in range(count)]
            in_span = [i for i, count in enumerate(self.counts) for _ in range(count)]
        self.positions = torch.tensor(positions, device=device)
        self.cache_rows = torch.tensor([self.rows[i] for i in in_span], device=device)
        self._place: Tensor | None = None
        if not self.even:
            place = [i * self.longest + j for i, count in enumerate(self.counts) for j in range(count)]
            self._place = torch.tensor(place, device=device)
        self.mask: Tensor | None = None
        if self.longest > 1 or not self.level:
            first = torch.tensor(self.starts, device=device)[:, None]
            queries = first + torch.arange(self.longest, device=device)  # (R, S)
            hidden = torch.arange(self.reach, device=device) > queries.unsqueeze(-1)  # (R, S, T)
            self.mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))

    def padded(self, packed: Tensor) -> Tensor:
        """(N, ...) -> (R, S, ...), zeros behind a shorter row."""
        shape = (self.n_rows, self.longest, *packed.shape[1:])
        if self._place is None:
            return packed.view(shape)
        flat = packed.new_zeros(self.n_rows * self.longest, *packed.shape[1:])
        return flat.index_copy_(0, self._place, packed).view(shape)

    def packed(self, padded: Tensor) -> Tensor:
        """(R, S, ...) -> (N, ...)."""
        flat = padded.reshape(self.n_rows * self.longest, *padded.shape[2:])
        return flat if self._place is None else flat.index_select(0, self._place)

    def slots(self, store: Tensor) -> Tensor:
        """The T slots of the span's rows: cache layer (B, C, W) -> (R, T, W)."""
        seen = store[:, : self.reach]
        return seen if self.whole else seen[self.rows]

    def write(self, store: Tensor, entries: Tensor) -> None:
        """Puts entries (N, W) into their slots of a cache layer (B, C, W)."""
        if self.whole and self.level and self.even:
            store[:, self.starts[0] : self.reach] = entries.view(self.n_rows, self.longest, -1)
        else:
            store.index_put_((self.cache_rows, self.positions), entries)

    def of_rows(self, packed: Tensor) -> list[Tensor]:
        """Each row's own tokens: (N, ...) -> R tensors (count, ...)."""
        ends = [0]
        for count in self.counts:
            ends.append(ends[-1] + count)
        return [packed[begin:end] for begin, end in pairwise(ends)]

    def last(self, packed: Tensor) -> Tensor:
        """Each row's last token: (N, ...) -> (R, ...)."""
        if self.longest == 1:
            return packed
        ends = torch.tensor(self.counts, device=packed.device).cumsum(0) - 1
        return packed.index_select(0, ends)
