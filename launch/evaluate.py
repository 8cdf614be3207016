"""Held-out loss and bits per byte: every token of every held-out document is predicted exactly once."""

# B batch, S window, D documents, M MoE layers (prediction modules included), E routed experts

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.dataset import HeldoutDocument
from launch.compressors import CompressedSizes, compressed_sizes
from launch.losses import target_masks
from model.config import ModelConfig
from model.transformer import Transformer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prediction:
    """What the held-out documents cost, and where the router sent their tokens.

    nats: over all tokens. raw_bytes: of the documents' text.
    tokens_per_expert: (D, M, E) int64 on the CPU, by document: the choices made for exactly the positions whose target
        counts, each once; the context that windows repeat and the padding are left out.
    """

    nats: float
    n_tokens: int
    n_documents: int
    raw_bytes: int
    tokens_per_expert: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a token, nats."""
        return self.nats / max(1, self.n_tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the raw text; each document's end is paid for too."""
        return self.nats / math.log(2) / max(1, self.raw_bytes)


@dataclass(frozen=True)
class Evaluation(Prediction):
    """A prediction, and the same bytes under general compressors."""

    compressed: CompressedSizes


def evaluate(
    model: Transformer,
    documents: Iterable[HeldoutDocument],
    eod_id: int,
    window: int,
    progress: Progress | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """`predict` with windows that overlap by half, and what gzip and xz make of the same bytes."""
    listed = list(documents)
    found = predict(model, listed, eod_id, window, progress=progress, batch_size=batch_size)
    return Evaluation(**vars(found), compressed=compressed_sizes([document.data for document in listed]))


@torch.no_grad()
def predict(
    model: Transformer,
    documents: Iterable[HeldoutDocument],
    eod_id: int,
    window: int,
    stride: int | None = None,
    progress: Progress | None = None,
    batch_size: int = 8,
) -> Prediction:
    """Predicts each document from its beginning, in windows of `window` tokens.

    A document is preceded by the end token, as in training; a token behind the first window has at least
    `window - stride` tokens of context. The routing bias is read and never moved.

    Args:
        model: on one device, with all experts.
        documents: held-out documents; their last token is the end token.
        eod_id: the end token.
        window: tokens of context, the training sequence length.
        stride: tokens from one window's start to the next one's, at most `window`; None is half a window.
        progress: called as progress(windows done, windows in total).
        batch_size: windows in a forward.
    """
    listed = list(documents)
    pieces = [
        (piece, number)
        for number, document in enumerate(listed)
        for piece in windows_of(document, eod_id, window, stride or max(1, window // 2))
    ]
    device = next(model.parameters()).device
    total, n_tokens = 0.0, 0
    with counted_choices(model, len(listed)) as counter:
        for first in range(0, len(pieces), batch_size):
            chunk = pieces[first : first + batch_size]
            tokens, targets, counts = laid_out([piece for piece, _ in chunk], len(chunk), window, eod_id)
            counter.expect(counts, [document for _, document in chunk])
            losses = model(tokens.to(device), None, targets.to(device)).token_losses
            total += float(losses.double()[counts.to(device)].sum())
            n_tokens += int(counts.sum())
            if progress:
                progress(min(first + batch_size, len(pieces)), len(pieces))
    raw_bytes = sum(len(document.data) for document in listed)
    return Prediction(total, n_tokens, len(listed), raw_bytes, counter.tokens_per_expert)


class ChoiceCounter:
    """Adds up the routers' choices at the positions that count.

    tokens_per_expert: (D, M, E) int64 on the CPU.
    """

    def __init__(self, n_documents: int, config: ModelConfig) -> None:
        shape = (n_documents, len(config.moe_layers), config.n_routed_experts)
        self.tokens_per_expert = torch.zeros(shape, dtype=torch.int64)
        self._depths = config.num_nextn_predict_layers
        self._masks: dict[int, Tensor] = {}  # by sequence length
        self._documents = torch.zeros(0, dtype=torch.int64)

    def expect(self, counts: Tensor, documents: list[int]) -> None:
        """What the next forward holds: which positions count, (B, S) bool, and each row's document.

        A prediction module of depth k sees S - k positions; its choice at t counts where the target at t + k does.
        """
        seq_len = counts.shape[1]
        by_depth = target_masks(counts, self._depths)
        self._masks = {seq_len - depth: mask[:, : seq_len - depth] for depth, mask in enumerate(by_depth)}
        self._documents = torch.tensor(documents)

    def add(self, row: int, topk_ids: Tensor) -> None:
        """Counts one layer's choices of this forward, (B * positions, K) int64."""
        batch = len(self._documents)
        mask = self._masks[topk_ids.shape[0] // batch]  # (B, positions)
        chosen = topk_ids.cpu()[mask.flatten()]  # (counted, K)
        document = self._documents.repeat_interleave(mask.sum(1))  # (counted,)
        n_documents, _, n_experts = self.tokens_per_expert.shape
        at = (document[:, None] * n_experts + chosen).flatten()
        found = torch.bincount(at, minlength=n_documents * n_experts).view(n_documents, n_experts)
        self.tokens_per_expert[:, row] += found


@contextmanager
def counted_choices(model: Transformer, n_documents: int) -> Iterator[ChoiceCounter]:
    """Counts what every router chooses while the block runs; the model is not told of padding here."""
    layers = model.config.moe_layers
    counter = ChoiceCounter(n_documents, model.config)

    def seen(row: int, gate: nn.Module, inputs: object, routing: tuple[Tensor, ...]) -> None:
        counter.add(row, routing[0])

    gates = [model.get_submodule(f"{layer}.mlp.gate") for layer in layers]
    hooks = [gate.register_forward_hook(partial(seen, row)) for row, gate in enumerate(gates)]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()


class Window(NamedTuple):
    """A part of a document: inputs and targets (n,) int64, n up to the window, and the first target that counts."""

    inputs: Tensor
    targets: Tensor
    first: int


def windows_of(document: HeldoutDocument, eod_id: int, window: int, stride: int) -> list[Window]:
    """Cuts a document, with the end token before it, into windows; every token is a counted target once."""
    stream = torch.cat((torch.tensor([eod_id]), torch.from_numpy(document.tokens)))
    inputs, targets = stream[:-1], stream[1:]
    found, counted, start = [], 0, 0
    while counted < len(targets):
        stop = min(start + window, len(targets))
        found.append(Window(inputs[start:stop], targets[start:stop], counted - start))
        counted = stop
        start += stride
    return found


def laid_out(windows: Sequence[Window], rows: int, window: int, eod_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows as rows of one batch: tokens and targets (rows, window) int64, and which targets count, bool.

    What the windows do not fill holds the end token and does not count.
    """
    tokens = torch.full((rows, window), eod_id, dtype=torch.int64)
    targets = torch.full((rows, window), eod_id, dtype=torch.int64)
    counts = torch.zeros((rows, window), dtype=torch.bool)
    for row, (inputs, wanted, first) in enumerate(windows):
        tokens[row, : len(inputs)], targets[row, : len(wanted)] = inputs, wanted
        counts[row, first : len(wanted)] = True
    return tokens, targets, counts
