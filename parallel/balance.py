"""The routing bias: moved once per optimizer step from integer counts over the whole global batch.

# M rows: MoE layers, multi-token-prediction blocks included; E routed experts
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.routing_stats import RoutingStats
from parallel.balance_rules import proportional_rule, quantile_rule, recentred, sign_rule
from parallel.communicator import Communicator
from parallel.config import BalanceConfig
from parallel.schedule import balance_rate


class BiasMismatchError(RuntimeError):
    """Ranks hold different routing biases: they would send the same token to different experts."""


class Balancer:
    """Counts the tokens of one optimizer step and moves the bias at its end.

    Args:
        biases: one (E,) fp32 buffer per MoE layer; changed in place, identically on every rank.
        config: rule and rates.
        communicator: all ranks that share the global batch.
    """

    def __init__(self, biases: Sequence[Tensor], config: BalanceConfig, communicator: Communicator) -> None:
        self.biases = list(biases)
        self.config = config
        self.communicator = communicator
        n_experts = self.biases[0].numel() if self.biases else 0
        self._counts = torch.zeros((len(self.biases), n_experts), dtype=torch.int64)
        self._needs: Tensor | None = None  # (M, E, BINS) int64
        self._raised_until = 0  # optimizer steps

    @property
    def wants_histogram(self) -> bool:
        """Whether forwards have to collect `bias_histogram`."""
        return self.config.rule == "quantile" and bool(self.biases)

    def add(self, routing: RoutingStats) -> None:
        """Adds one micro-step's counts of this rank. Evaluation never calls this."""
        if not self.biases:  # a dense model
            return
        self._counts += routing.tokens_per_expert.to(self._counts.device)
        if self.wants_histogram:
            needs = routing.bias_histogram.to(self._counts.device)
            self._needs = needs if self._needs is None else self._needs + needs

    def rate(self, optimizer_steps: int) -> float:
        """The rate of the move after so many earlier optimizer steps: schedule, and an alarm's raise."""
        raised = optimizer_steps < self._raised_until
        return balance_rate(self.config, optimizer_steps) * (self.config.raise_rate_factor if raised else 1.0)

    def step(self, optimizer_steps: int) -> Tensor:
        """Sums over all ranks, moves the bias, and starts the next step's count from zero.

        Args:
            optimizer_steps: taken before this one; a skipped step does not count.

        Returns:
            (M, E) int64 on the CPU: tokens per expert over the global batch.
        """
        counts, needs = self._take()
        rate = self.rate(optimizer_steps)
        if self.biases and self.config.moves_bias and rate > 0:
            bias = self.bias_table()
            if self.config.rule == "sign":
                bias = sign_rule(counts, bias, rate)
            elif self.config.rule == "proportional":
                bias = proportional_rule(counts, bias, rate)
            else:
                assert needs is not None, "no micro-step was added with its histogram"
                bias = quantile_rule(needs, counts, bias, rate)
            if self.config.recentre:
                bias = recentred(bias)
            for row, buffer in zip(bias, self.biases, strict=True):
                buffer.copy_(row)
        return counts

    def skip(self) -> Tensor:
        """Returns the counts of a step that was skipped, and forgets them: they must not move the bias."""
        return self._take()[0]

    def _take(self) -> tuple[Tensor, Tensor | None]:
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        needs, self._needs = self._needs, None
        return self.communicator.all_reduce(counts), None if needs is None else self.communicator.all_reduce(needs)

    def raise_rate(self, optimizer_steps: int) -> None:
        """Multiplies the rate by `raise_rate_factor` for the next `raise_rate_steps` optimizer steps."""
        self._raised_until = optimizer_steps + self.config.raise_rate_steps

    def bias_table(self) -> Tensor:
        """(M, E) fp32 copy of all biases on the CPU."""
        return torch.stack([bias.detach().cpu() for bias in self.biases]) if self.biases else torch.zeros(0, 0)

    def check(self) -> None:
        """Compares the biases of all ranks; collective.

        Raises:
            BiasMismatchError: on every rank, naming the ranks that differ from most, or all where none is most.
        """
        digest = hashlib.sha256(self.bias_table().numpy().tobytes()).hexdigest()
        holders: dict[str, list[int]] = {}  # ranks by what they hold
        for rank, one in enumerate(self.communicator.gather(digest)):
            holders.setdefault(one, []).append(rank)
        if len(holders) == 1:
            return
        most, *others = sorted(holders.values(), key=len, reverse=True)
        if 2 * len(most) > self.communicator.size:
            odd = sorted(rank for ranks in others for rank in ranks)
            found = f"the routing bias of ranks {odd} differs from that of the {len(most)} other ranks"
        else:
            found = f"ranks {' and '.join(map(str, [most, *others]))} hold different routing biases, none that of most"
        raise BiasMismatchError(
            f"{found}, which can only come from damaged memory or a rank that ran other code; go back to the last "
            "checkpoint, and take the named ranks' nodes out if it happens again"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep beside the biases."""
        return {"raised_until": self._raised_until}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave; an older checkpoint's empty state means no raise."""
        self._raised_until = int(state.get("raised_until", 0))
