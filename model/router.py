"""Which experts a token goes to and with what weight; the statistics that balancing needs."""

# B batch, S seq, T = B*S tokens, D hidden, E routed experts, K top-k

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class RoutingMemory:
    """The choice of one layer in one forward, kept so that recomputation in the backward makes the same one.

    A near-tie may flip when scores are computed again (another kernel, another batch shape), and then tensors no longer
    match what other ranks expect. A plain object, since hooks that walk arguments copy lists but leave objects alone.
    """

    topk_ids: Tensor | None = None


class Routing(NamedTuple):
    """What a router returns; only tensors."""

    topk_ids: Tensor  # (T, K) int64
    topk_weights: Tensor  # (T, K) fp32, with gradient
    tokens_per_expert: Tensor  # (E,) int64
    sequence_balance: Tensor  # 0-d fp32, with gradient: sum over sequences of sum_i f_i P_i
    changed_by_bias: Tensor  # 0-d int64: choices that the bias changed


class Router(nn.Module):
    """Owns the gate's weight (E, D) and the balancing bias (E) fp32, which steers the choice and nothing else."""

    e_score_correction_bias: Tensor

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.full((experts, config.hidden_size), float("nan"), device=device, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Every cast or move of a module passes here. The bias follows to the device but never leaves fp32: its steps
        of 0.001 are lost in bfloat16, and a cast there and back would keep the rounding."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def forward(self, x: Tensor, memory: RoutingMemory | None = None) -> tuple[Tensor, ...]:
        """Score, choose, weigh, count.

        Args:
            x: (B, S, D).
            memory: where given, the choice is taken from it, or left in it if it is empty.

        Returns:
            The fields of Routing in order, as a plain tuple.
        """
        config = self.config
        batch, seq_len, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.reshape(-1, width).float(), self.weight.float())  # (T, E)
            scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        bias = self.e_score_correction_bias if config.uses_bias else None
        plain = scores.detach()
        if memory is not None and memory.topk_ids is not None:
            topk_ids = memory.topk_ids
        else:
            topk_ids = choose_experts(plain, bias, config)
            if memory is not None:
                memory.topk_ids = topk_ids
        topk_weights = weigh(scores, topk_ids, config)
        counts = count_tokens(topk_ids.view(batch, -1), config.n_routed_experts)  # (B, E)
        balance = sequence_balance(scores.view(batch, seq_len, -1), counts, config.num_experts_per_tok)
        changed = count_changed(topk_ids, plain, config) if bias is not None else counts.new_zeros(())
        return tuple(Routing(topk_ids, topk_weights, counts.sum(0), balance, changed))


@torch.no_grad()
def choose_experts(scores: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:
    """The K best experts of each token, inside its best groups.

    Args:
        scores: (T, E) fp32.
        bias: (E) fp32, added to the scores for the choice only; None for no bias.

    Returns:
        (T, K) int64.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; group limit: DeepSeek-V2 (arXiv 2405.04434) section 2.1.4.
    """
    biased = scores if bias is None else scores + bias
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        grouped = biased.view(-1, config.n_group, config.n_routed_experts // config.n_group)
        best = 2 if config.uses_bias else 1
        group_scores = grouped.topk(best, dim=-1, sorted=False).values.sum(-1)  # (T, n_group)
        kept = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        # Minus infinity and not zero: a biased score may be negative, and zero would then win.
        biased = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
    return biased.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def weigh(scores: Tensor, topk_ids: Tensor, config: ModelConfig) -> Tensor:
    """Weights of the chosen experts, from the scores without bias: (T, E), (T, K) -> (T, K) fp32."""
    weights = scores.gather(1, topk_ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor


def count_tokens(ids: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen in each row: (B, S*K) -> (B, E) int64."""
    counts = torch.zeros(ids.shape[0], n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids))


def sequence_balance(scores: Tensor, counts: Tensor, top_k: int) -> Tensor:
    """Sequence-wise balance: sum over sequences of sum_i f_i P_i, without its coefficient.

    f_i = E / (K S) * (tokens of the sequence that chose expert i), P_i = mean over the sequence of the score
    normalised over all experts. It is 1 for a sequence in perfect balance.

    Args:
        scores: (B, S, E) fp32, with gradient.
        counts: (B, E) int64, of the choices that were made, bias included.

    Source: DeepSeek-V3 (arXiv 2412.19437) equations 17-20.
    """
    _, seq_len, experts = scores.shape
    frequency = counts.float() * (experts / (top_k * seq_len))  # (B, E)
    # mean_t(s_ti / sum_j s_tj), as one product of the (S) inverse sums with the (S, E) scores for each sequence
    inverse_sums = scores.sum(-1).add(1e-20).reciprocal()  # (B, S)
    probability = torch.bmm(inverse_sums.unsqueeze(1), scores).squeeze(1) / seq_len  # (B, E)
    return (frequency * probability).sum()


@torch.no_grad()
def count_changed(topk_ids: Tensor, scores: Tensor, config: ModelConfig) -> Tensor:
    """How many of the choices (T, K) would not have been made without bias: 0-d int64."""
    plain = choose_experts(scores, None, config)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, plain, True)
    return topk_ids.numel() - chosen.gather(1, topk_ids).sum()
