"""Modules as plain functions for inference: weights are looked up once, and nothing is prepared for gradients.

A step of decoding is so short that finding a parameter in its module takes as long as a small product with it.
"""

# N tokens (packed), K inputs, D width

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.products import LEAST_ROWS, linear
from model.layers import Head, Linear, RMSNorm

# From so many numbers on, that do not stay in a core's cache from step to step, a matrix is read in its own order for a
# few rows: 4 rows by 192 x 4096 in 0.16 ms and not 0.30 (one thread, fp32, nine such matrices in turns).
_LARGE = 2**19

Function = Callable[[Tensor], Tensor]


def linear_function(module: nn.Module) -> Function:
    """x (N, K) -> (N, out) of a Linear, or logits of a Head; another module, as with rounded weights, stays itself."""
    if not isinstance(module, Linear | Head):
        return module
    weight = module.weight.detach()
    turned = weight.t()
    if weight.device.type == "cpu" and weight.numel() >= _LARGE:

        def product(x: Tensor) -> Tensor:
            n_rows = x.shape[0]
            if 1 < n_rows < LEAST_ROWS:
                return torch.mm(weight, x.t()).t().contiguous()
            return torch.mm(x, turned) if n_rows == 1 else linear(x, weight)

        return product
    return lambda x: torch.mm(x, turned) if x.shape[0] < LEAST_ROWS else linear(x, weight)


def norm_function(module: RMSNorm) -> Function:
    """x (N, D) -> (N, D). In fp32 on a CPU the arithmetic of kernels/rms_norm.py in fewer calls: 7 us for a row of
    192, where torch's own takes 10 and an autograd function 16."""
    weight, width, eps = module.weight.detach(), module.weight.shape[0], module.eps
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.rms_norm(x, (width,), weight, eps)
    least = torch.full((), eps)

    def normalised(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(least, norm, norm, value=1 / width).rsqrt_()).mul_(weight)

    return normalised
