"""The small modules that own one parameter each: linear map, embedding, normalisation, head."""

# B batch, S seq, D hidden, V vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.products import linear
from kernels.rms_norm import rms_norm

# Modules start as NaN and not as random numbers: initial values come from model/init.py or a checkpoint, and a model
# that got neither shows it in its first loss.


class Linear(nn.Linear):
    """y = x W^T, without bias term; weight (out, in)."""

    def __init__(
        self, n_in: int, n_out: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(n_in, n_out, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if torch.is_grad_enabled() else linear(x, self.weight)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class Embedding(nn.Embedding):
    """tokens (B, S) int64 -> (B, S, D); weight (V, D)."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float("nan"))


class RMSNorm(nn.Module):
    """Root mean square normalisation of the last dimension; weight (D,)."""

    def __init__(
        self, width: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float("nan"), device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Head(nn.Module):
    """The output layer; weight (V, D). With targets it returns losses, so that logits need not all be alive."""

    def __init__(
        self, hidden: int, vocab: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((vocab, hidden), float("nan"), device=device, dtype=dtype))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Args: hidden (..., D); targets (...) int64 or None. Returns: logits (..., V), or losses (...) fp32."""
        if targets is None:
            return F.linear(hidden, self.weight) if torch.is_grad_enabled() else linear(hidden, self.weight)
        losses = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), self.weight, targets.reshape(-1))
        return losses.view(targets.shape)
