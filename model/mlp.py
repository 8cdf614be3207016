"""Dense SwiGLU feed-forward, also used for the shared experts."""

# B batch, S seq, D hidden, I intermediate

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.swiglu import swiglu_pair
from model.layers import Linear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); weights gate_proj and up_proj (I, D), down_proj (D, I)."""

    def __init__(
        self, hidden: int, intermediate: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, device, dtype)
        self.up_proj = Linear(hidden, intermediate, device, dtype)
        self.down_proj = Linear(intermediate, hidden, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu_pair(self.gate_proj(x), self.up_proj(x)))
