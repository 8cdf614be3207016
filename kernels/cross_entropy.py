"""Cross-entropy of a linear head for each token, in pieces, so that a long sequence's logits need not all be alive."""

# T tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

# Keep the logits for the backward up to this size; above it, chunks of this size are computed again in the backward.
# Computing them again costs one more T*D*V product, about a quarter of the head's time.
KEEP_BYTES = 256 * 2**20
# A chunk of this many bytes of fp32 logits is worked on at a time: it stays near the cache on a CPU.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int = KEEP_BYTES) -> Tensor:
    """Negative log-likelihood of each target under softmax(hidden @ weight.T), unreduced, gradients exact.

    Args:
        hidden: (T, D), any float dtype.
        weight: (V, D), same dtype (under autocast both are cast to its dtype).
        targets: (T,) int64 in [0, V). There is no "ignore" value: mask the losses.
        keep_bytes: the largest fp32 logits (T * V * 4 bytes) that are kept for the backward.

    Returns:
        (T,) fp32, nats.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, weight, targets, keep_bytes))


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps each token's sum and peak of the softmax; and, if they are small, its numerators exp(logit - peak)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int) -> Tensor:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        training = any(ctx.needs_input_grad)
        keep = training and tokens * vocab * 4 <= keep_bytes
        buffer = hidden.new_empty(tokens if keep else _chunk_rows(hidden, weight), vocab, dtype=torch.float32)
        sums, peaks, picked = hidden.new_empty(3, tokens, dtype=torch.float32)
        for part in _parts(hidden, weight):
            logits = _logits(hidden[part], weight, buffer[part] if keep else buffer[: part.stop - part.start])
            torch.gather(logits, 1, targets[part, None], out=picked[part, None])
            torch.amax(logits, 1, out=peaks[part])
            torch.sum(logits.sub_(peaks[part, None]).exp_(), 1, out=sums[part])
        if training:
            ctx.save_for_backward(hidden, weight, targets, sums, peaks, *((buffer,) if keep else ()))
        return sums.log() + peaks - picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, sums, peaks, *kept = ctx.saved_tensors
        grad = grads[0]
        scale = (grad / sums)[:, None]
        buffer = hidden.new_empty(_chunk_rows(hidden, weight), weight.shape[0], dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for part in _parts(hidden, weight):
            # d loss / d logits = softmax - onehot(target); kept numerators stay untouched for a second backward
            error = buffer[: part.stop - part.start]
            if kept:
                torch.mul(kept[0][part], scale[part], out=error)
            else:
                _logits(hidden[part], weight, error).sub_(peaks[part, None]).exp_().mul_(scale[part])
            error.scatter_add_(1, targets[part, None], -grad[part, None])
            if hidden.dtype == torch.float32:
                torch.mm(error, weight, out=grad_hidden[part])
                torch.addmm(grad_weight, error.t(), hidden[part], out=grad_weight)
            else:
                narrow = error.to(hidden.dtype)
                torch.mm(narrow, weight, out=grad_hidden[part])
                grad_weight += (narrow.t() @ hidden[part]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    limit = CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
    return min(max(1, limit // (4 * weight.shape[0])), hidden.shape[0])


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    tokens, rows = hidden.shape[0], _chunk_rows(hidden, weight)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, max(rows, 1)))


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """(rows, D) @ (V, D).T -> out (rows, V) fp32."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    return out.copy_(hidden @ weight.t())
