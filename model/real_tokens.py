"""Which positions of a batch hold a token of some document: only these are sent to experts and counted."""

# B batch, S seq, T = B*S positions, N real tokens among them

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of a batch that has other positions too. A plain object: hooks that walk arguments copy tuples.

    rows: (N,) int64, rising, their places among the T positions. batch, seq_len: B and S.
    """

    rows: Tensor
    batch: int
    seq_len: int

    @property
    def sequence(self) -> Tensor:
        """(N,) int64: the sequence of each token."""
        return torch.div(self.rows, self.seq_len, rounding_mode="floor")

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: real tokens of each sequence."""
        return self.rows.new_zeros(self.batch).scatter_add_(0, self.sequence, torch.ones_like(self.rows))

    def take(self, x: Tensor) -> Tensor:
        """(T, D) -> (N, D)."""
        return x.index_select(0, self.rows)

    def spread(self, x: Tensor) -> Tensor:
        """(N, D) -> (T, D), zero at every other position."""
        return x.new_zeros(self.batch * self.seq_len, *x.shape[1:]).index_copy(0, self.rows, x)


def same_document_ahead(doc_ids: Tensor, depth: int) -> Tensor:
    """(B, S) -> (B, S - depth) bool: whether the token `depth` places ahead belongs to the same document."""
    seq_len = doc_ids.shape[1]
    return doc_ids[:, : seq_len - depth] == doc_ids[:, depth:]


def find_real(real: Tensor | None, doc_ids: Tensor | None, depths: int) -> tuple[bool, list[RealTokens | None]]:
    """Whether attention needs the documents, and the tokens that each depth works on.

    Depth 0 is the main model. The module of depth k at position t joins position t with the token at t + k: it works
    where both are real and of one document. The host waits for the device once, or not at all without arguments.

    Args:
        real: (B, S) bool, False at padding; None where there is none.
        doc_ids: (B, S) integers, non-decreasing along S; None for one document a sequence.
        depths: prediction modules that will run.

    Returns:
        Whether a sequence has several documents. For depth 0 to `depths` the RealTokens among S - depth positions a
        sequence, None where all of them are.
    """
    found: list[RealTokens | None] = [None] * (depths + 1)
    if real is None and doc_ids is None:
        return False, found
    masks: list[Tensor | None] = [real]
    for depth in range(1, depths + 1):
        mask = None if doc_ids is None else same_document_ahead(doc_ids, depth)
        if real is not None:
            both = real[:, :-depth] & real[:, depth:]
            mask = both if mask is None else both & mask
        masks.append(mask)
    wanted = [mask.sum() for mask in masks if mask is not None]
    if doc_ids is not None:
        wanted.append((doc_ids[:, :1] != doc_ids[:, -1:]).sum())
    numbers = torch.stack(wanted).tolist()
    several = numbers.pop() > 0 if doc_ids is not None else False
    for depth, mask in enumerate(masks):
        if mask is not None and (n_real := numbers.pop(0)) < mask.numel():
            found[depth] = RealTokens(torch.nonzero_static(mask.flatten(), size=n_real)[:, 0], *mask.shape)
    return several, found
