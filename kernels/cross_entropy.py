"""Cross-entropy of a linear head for each token, one block of the vocabulary after the other: no whole logits."""

# T tokens, D hidden, V vocabulary, W words of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from kernels.backend import Backend, resolve, size_class
from kernels.choice import both_ways

# What the backward needs of the logits is kept up to so many bytes, the first blocks first; the rest is computed again,
# for one more T*D*V product in four. With 48 MiB 512 tokens of hidden size 256 and 129,280 words, whose gradient takes
# 126 MiB, stay 4.2 times below what whole logits need.
KEEP_BYTES = 48 * 2**20
# A block of logits: near the cache on a CPU, large enough for full products on a GPU.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Narrower products waste the processor; many tokens then mean larger blocks.
LEAST_WORDS = 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int = KEEP_BYTES, backend: Backend = "auto"
) -> Tensor:
    """Negative log-likelihood of each target under softmax(hidden @ weight.T), unreduced, gradients exact.

    A block of the vocabulary meets all tokens at once, so that its part of the weight is read, and its gradient
    written, once. Blocks of tokens instead would read the whole weight and add to its whole gradient for each.

    Args:
        hidden: (T, D), any float dtype.
        weight: (V, D), same dtype (under autocast both are cast to its dtype).
        targets: (T,) int64 in [0, V). There is no "ignore" value: mask the losses.
        keep_bytes: of logits kept for the backward; 0 keeps none.
        backend: of the softmax and its gradient; the products are torch's. `reference`, `triton` (a GPU, or Triton's
            interpreter), or `auto`.

    Returns:
        (T,) fp32, nats.

    Source: the idea of never forming all logits: Wijmans et al. 2024, arXiv 2411.09009.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)

    targets = targets.contiguous()

    def run(name: str) -> list[Tensor]:
        return both_ways(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, keep_bytes, cast(Backend, name)),
            hidden, weight,
        )  # fmt: skip

    shapes = (size_class(hidden.shape[0]), *weight.shape, keep_bytes)
    chosen = resolve("linear_cross_entropy", backend, hidden, run, shapes)
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, weight, targets, keep_bytes, chosen == "triton"))


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps each token's log of the sum of exponentials and, as far as allowed, blocks: exp(logit - the block's peak)
    and that peak; in Triton the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int, in_triton: bool) -> Tensor:
        softmax: Any = _triton() if in_triton else _Softmax
        kind = hidden.dtype if in_triton else torch.promote_types(hidden.dtype, torch.float32)
        n_tokens = hidden.shape[0]
        blocks = list(_blocks(hidden, weight, kind))
        training = any(ctx.needs_input_grad)
        left = keep_bytes if training else 0
        log_sums = torch.full((n_tokens,), float("-inf"), dtype=_wide(kind), device=hidden.device)
        picked = torch.zeros_like(log_sums)
        scratch = _scratch(hidden, blocks, kind)
        kept: list[Tensor] = []
        peaks: list[Tensor] = []
        for block in blocks:
            width = block.stop - block.start
            size = n_tokens * width * kind.itemsize
            keep = size <= left
            left = left - size if keep else 0  # the first blocks, without gaps
            room = hidden.new_empty(n_tokens * width, dtype=kind) if keep else scratch[: n_tokens * width]
            logits = _logits(hidden, weight[block], room.view(n_tokens, width))
            peak = softmax.scan(logits, targets, block.start, log_sums, picked)
            if keep:
                kept.append(logits)
                peaks.append(peak)
        if training:
            ctx.save_for_backward(hidden, weight, targets, log_sums, *kept, *peaks)
            ctx.in_triton, ctx.n_kept = in_triton, len(kept)
        return (log_sums - picked).float() if kind != torch.float64 else log_sums - picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums, *rest = ctx.saved_tensors
        kept, peaks = rest[: ctx.n_kept], rest[ctx.n_kept :]
        softmax: Any = _triton() if ctx.in_triton else _Softmax
        kind = hidden.dtype if ctx.in_triton else torch.promote_types(hidden.dtype, torch.float32)
        grad = grads[0].contiguous()
        exact = hidden.dtype in (torch.float32, torch.float64)
        grad_hidden = torch.zeros(hidden.shape, dtype=_wide(hidden.dtype), device=hidden.device)
        grad_weight = torch.empty_like(weight)
        blocks = list(_blocks(hidden, weight, kind))
        scratch = _scratch(hidden, blocks, kind)
        for number, block in enumerate(blocks):
            width = block.stop - block.start
            error = scratch[: hidden.shape[0] * width].view(hidden.shape[0], width)
            if number < len(kept):  # kept blocks stay untouched for a second backward
                softmax.error(kept[number], peaks[number], targets, block.start, log_sums, grad, error)
            else:
                _logits(hidden, weight[block], error)
                softmax.error(error, None, targets, block.start, log_sums, grad, error)
            if exact:
                torch.addmm(grad_hidden, error, weight[block], out=grad_hidden)
            else:
                error = error.to(hidden.dtype)
                grad_hidden += error @ weight[block]
            torch.mm(error.t(), hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


class _Softmax:
    """The softmax's two passes over a block, in torch."""

    @staticmethod
    def scan(logits: Tensor, targets: Tensor, start: int, log_sums: Tensor, picked: Tensor) -> Tensor:
        """Take a block into account: updates log_sums and picked (T,), turns the logits (T, W) into exp(logit - peak).

        Returns:
            (T,) the peaks.
        """
        place, inside = _places(targets, start, logits.shape[1])
        torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), picked, out=picked)
        peak = logits.amax(1)
        sums = logits.sub_(peak[:, None]).exp_().sum(1)
        torch.logaddexp(log_sums, sums.log_().add_(peak), out=log_sums)
        return peak

    @staticmethod
    def error(
        block: Tensor, peak: Tensor | None, targets: Tensor, start: int, log_sums: Tensor, grad: Tensor, out: Tensor
    ) -> None:
        """Write grad * (softmax - onehot) to `out` (T, W), from exp(logit - peak), or, without peak, from logits, where
        `out` may be the same tensor."""
        if peak is None:
            torch.sub(block, log_sums[:, None], out=out).exp_().mul_(grad[:, None])
        else:
            torch.mul(block, ((peak - log_sums).exp_() * grad)[:, None], out=out)
        place, inside = _places(targets, start, out.shape[1])
        out.scatter_add_(1, place[:, None], torch.where(inside, -grad, 0.0).to(out.dtype)[:, None])


def _places(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a block, and whether it lies in it (if not, the column is any)."""
    place = targets - start
    inside = (place >= 0) & (place < width)
    return place.clamp_(0, width - 1), inside


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _triton() -> object:
    from kernels.cross_entropy_triton import TritonSoftmax

    return TritonSoftmax


def _blocks(hidden: Tensor, weight: Tensor, kind: torch.dtype) -> Iterator[slice]:
    """Even blocks of the vocabulary."""
    vocab = weight.shape[0]
    limit = BLOCK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
    words = max(limit // (max(hidden.shape[0], 1) * kind.itemsize), LEAST_WORDS)
    count = -(-vocab // words)
    words = -(-vocab // count)
    words = min(-(-words // 64) * 64, vocab) if words > 64 else words  # whole cache lines and tiles
    return (slice(start, min(start + words, vocab)) for start in range(0, vocab, words))


def _scratch(hidden: Tensor, blocks: list[slice], kind: torch.dtype) -> Tensor:
    """Room for the widest block, flat, so that each block of it is dense."""
    return hidden.new_empty(hidden.shape[0] * (blocks[0].stop - blocks[0].start), dtype=kind)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """(T, D) @ (W, D).T -> (T, W), in the dtype of `out`."""
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    return out.copy_(hidden @ weight.t())
