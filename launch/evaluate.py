"""Held-out loss and bits per byte: every token of every held-out document is predicted exactly once."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data.dataset import HeldoutDocument
from launch.compressors import CompressedSizes, compressed_sizes
from model.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """What the held-out documents cost: nats over all tokens, and the same bytes under general compressors."""

    nats: float
    n_tokens: int
    n_documents: int
    compressed: CompressedSizes

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token, nats."""
        return self.nats / max(1, self.n_tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the raw text; each document's end is paid for too."""
        return self.nats / math.log(2) / max(1, self.compressed.raw_bytes)


@torch.no_grad()
def evaluate(
    model: Transformer,
    documents: Iterable[HeldoutDocument],
    eod_id: int,
    window: int,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Predicts each document from its beginning, in windows of `window` tokens that overlap by half.

    A document is preceded by the end token, as in training; a token in the second half of a window has at least
    `window / 2` tokens of context. The routing bias is not touched.

    Args:
        model: on one device, with all experts.
        documents: held-out documents; their last token is the end token.
        eod_id: the end token.
        window: tokens of context, the training sequence length.
        progress: called as progress(windows done, windows in total).
    """
    listed = list(documents)
    pieces: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # inputs, targets, first target that counts
    for document in listed:
        stream = torch.cat((torch.tensor([eod_id]), torch.from_numpy(document.tokens)))
        pieces += _windows(stream, window)
    device = next(model.parameters()).device
    total, n_tokens = 0.0, 0
    for first in range(0, len(pieces), batch_size):
        chunk = pieces[first : first + batch_size]
        tokens = torch.full((len(chunk), window), eod_id, dtype=torch.int64)
        targets = torch.full((len(chunk), window), eod_id, dtype=torch.int64)
        counts = torch.zeros((len(chunk), window), dtype=torch.bool)
        for row, (inputs, wanted, start) in enumerate(chunk):
            tokens[row, : len(inputs)], targets[row, : len(wanted)] = inputs, wanted
            counts[row, start : len(wanted)] = True
        losses = model(tokens.to(device), None, targets.to(device)).token_losses
        total += float(losses.double()[counts.to(device)].sum())
        n_tokens += int(counts.sum())
        if progress:
            progress(min(first + batch_size, len(pieces)), len(pieces))
    return Evaluation(total, n_tokens, len(listed), compressed_sizes([document.data for document in listed]))


def _windows(stream: torch.Tensor, window: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Cuts a document (n + 1,) into overlapping windows; every token but the first is a counted target once."""
    inputs, targets = stream[:-1], stream[1:]
    found, counted, start = [], 0, 0
    while counted < len(targets):
        stop = min(start + window, len(targets))
        found.append((inputs[start:stop], targets[start:stop], counted - start))
        counted = stop
        start += max(1, window // 2)
    return found
