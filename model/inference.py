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
from model.layers import Linear, RMSNorm

Function = Callable[[Tensor], Tensor]


def linear_function(module: nn.Module) -> Function:
    """x (N, K) -> (N, out) of a Linear; another module, with rounded weights for example, stays itself."""
    if not isinstance(module, Linear):
        return module
    weight = module.weight.detach()
    turned = weight.t()
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
