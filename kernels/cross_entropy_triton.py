"""Triton kernels of the softmax over a block of logits: its sums, and its gradient written over the logits."""

# T tokens, W words of a block

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def scan_kernel(logits_ptr, targets_ptr, log_sums_ptr, picked_ptr, start, width, BLOCK: tl.constexpr):
    """One token: the block's peak and sum of exponentials in one pass, joined to what earlier blocks gave."""
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * width
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, logits)
        # A lane that has seen nothing but minus infinity would give NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(logits - base)
        peak = higher
    highest = tl.max(peak, axis=0)
    before = tl.load(log_sums_ptr + token)
    highest = tl.maximum(highest, before)
    total = tl.sum(total * tl.exp(peak - highest), axis=0) + tl.exp(before - highest)
    tl.store(log_sums_ptr + token, highest + tl.log(total))
    place = tl.load(targets_ptr + token) - start
    if (place >= 0) & (place < width):
        tl.store(picked_ptr + token, tl.load(row + place).to(tl.float32))


@triton.jit
def error_kernel(
    logits_ptr, targets_ptr, log_sums_ptr, grad_ptr, out_ptr, start, width, BLOCK: tl.constexpr
):  # fmt: skip
    """grad * (softmax - onehot); `out` may be the logits themselves: each is read before it is written."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    logits = tl.load(logits_ptr + token * width + columns, mask=inside, other=float("-inf")).to(tl.float32)
    error = tl.exp(logits - tl.load(log_sums_ptr + token))
    error -= (columns == tl.load(targets_ptr + token) - start).to(tl.float32)
    error *= tl.load(grad_ptr + token)
    tl.store(out_ptr + token * width + columns, error.to(out_ptr.dtype.element_ty), mask=inside)


class TritonSoftmax:
    """As the reference's, but the logits stay what they are and there is no peak to keep."""

    @staticmethod
    def scan(logits: Tensor, targets: Tensor, start: int, log_sums: Tensor, picked: Tensor) -> Tensor:
        """Updates log_sums and picked (T,) fp32 by a block of logits (T, W), dense."""
        n_tokens, width = logits.shape
        if n_tokens:
            scan_kernel[(n_tokens,)](
                logits, targets, log_sums, picked, start, width, BLOCK=min(BLOCK, triton.next_power_of_2(width)),
                num_warps=8,
            )  # fmt: skip
        return torch.empty(0, device=logits.device)

    @staticmethod
    def error(
        block: Tensor, peak: Tensor | None, targets: Tensor, start: int, log_sums: Tensor, grad: Tensor, out: Tensor
    ) -> None:
        """Write grad * (softmax - onehot) of logits (T, W) to `out`, which may be the same tensor."""
        n_tokens, width = block.shape
        if n_tokens:
            size = min(BLOCK, triton.next_power_of_2(width))
            error_kernel[(n_tokens, triton.cdiv(width, size))](
                block, targets, log_sums, grad, out, start, width, BLOCK=size, num_warps=8
            )
