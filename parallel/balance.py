"""The routing bias: moved once per optimizer step from integer token counts over the whole global batch.

Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), and
DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.

# E routed experts; one row per MoE layer (multi-token-prediction blocks included)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.config import BalanceConfig


def sign_rule(counts: Tensor, bias: Tensor, rate: float) -> Tensor:
    """Moves every expert's bias by `rate` towards the mean load.

    Args:
        counts: (..., E) int64 tokens per expert over the global batch.
        bias: (..., E) fp32 current bias.
        rate: step of the bias, in units of the score.

    Returns:
        (..., E) fp32: `bias + rate * sign(mean - count)`.

    The comparison is made in integers, `E * count` against the total: a mean rounded to bf16 is known to flip the sign
    of an update (Megatron-LM pull request 7081).
    """
    shortfall = counts.sum(-1, keepdim=True) - counts * counts.shape[-1]
    return bias + rate * torch.sign(shortfall).to(bias.dtype)


class Balancer:
    """Counts the tokens of one optimizer step and moves the bias at its end.

    Args:
        biases: one (E,) fp32 buffer per MoE layer; changed in place, identically on every rank.
        config: rule and rate.
        communicator: all ranks that share the global batch.
    """

    def __init__(self, biases: Sequence[Tensor], config: BalanceConfig, communicator: Communicator) -> None:
        self.biases = list(biases)
        self.config = config
        self.communicator = communicator
        n_experts = self.biases[0].numel() if self.biases else 0
        self._local = torch.zeros((len(self.biases), n_experts), dtype=torch.int64)

    def add(self, tokens_per_expert: Tensor) -> None:
        """Adds one micro-step's counts of this rank: (n_moe_layers, E) int64. Evaluation never calls this."""
        self._local += tokens_per_expert.to(self._local.device)

    def step(self) -> Tensor:
        """Sums the counts over all ranks, moves the bias, and starts the next step's count from zero.

        Returns:
            (n_moe_layers, E) int64 on the CPU: tokens per expert over the global batch.
        """
        counts = self._take()
        if self.config.rule == "sign":
            for row, bias in zip(counts, self.biases, strict=True):
                bias.copy_(sign_rule(row.to(bias.device), bias, self.config.rate))
        return counts

    def skip(self) -> Tensor:
        """Returns the counts of a step that was skipped, and forgets them: they must not move the bias."""
        return self._take()

    def _take(self) -> Tensor:
        counts, self._local = self._local, torch.zeros_like(self._local)
        return self.communicator.all_reduce(counts)

    def bias_table(self) -> Tensor:
        """(n_moe_layers, E) fp32 copy of all biases on the CPU."""
        return torch.stack([bias.detach().cpu() for bias in self.biases]) if self.biases else torch.zeros(0, 0)
