"""How far each expert's bias would have to move for each token to choose it, as counts that can be added over ranks.

Quantile balancing asks for the bias at which an expert is chosen by exactly its share of the tokens. With a token's
threshold held still, the expert is chosen by every token that needs less than the move: the answer is a quantile of the
needs. The counts of a histogram add up over micro-batches and ranks, and their size does not grow with the batch.

# T tokens, E routed experts, K top-k, M edges of the histogram
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from model.config import ModelConfig

BINS = 512
REACH = 2.0  # needs beyond it fall into the outermost bins; sigmoid scores differ by at most 1


@functools.cache
def bin_edges() -> Tensor:
    """(BINS + 1,) fp64, from -REACH to REACH with cubic spacing: 3e-8 wide at zero, 0.02 at the ends.

    The closer the bias is to its goal, the smaller the needs around the wanted quantile and the finer they are told
    apart; even spacing would need ten thousand bins for softmax scores of 256 experts, which are around 0.004.
    """
    places = torch.linspace(-1.0, 1.0, BINS + 1, dtype=torch.float64)
    return REACH * places**3


@torch.no_grad()
def bias_needed(biased: Tensor, config: ModelConfig) -> Tensor:
    """The move of one expert's bias at which a token begins to choose it: (T, E) -> (T, E) fp32.

    Positive where the token does not choose the expert, negative where it does. The threshold of a token lies half-way
    between its last chosen and its first unchosen expert: any value between them minimises the dual problem's
    coordinate (the source takes the lower end). An expert outside the token's groups also has to lift its group over
    the last kept one, and an expert inside may fall with its group.

    Args:
        biased: (T, E) fp32 scores with the current bias.
        config: gives K and the groups.

    Source: quantile balancing, Kimi K3 technical report, section 2.3.3 and appendix C; the treatment of groups is ours.
    """
    top_k = config.num_experts_per_tok
    if not config.limits_groups:
        if top_k == config.n_routed_experts:
            return torch.full_like(biased, -REACH)
        ends = biased.topk(top_k + 1, dim=-1).values[:, -2:]  # (T, 2)
        return ends.mean(-1, keepdim=True) - biased
    per_group = config.n_routed_experts // config.n_group
    grouped = biased.view(-1, config.n_group, per_group)
    group_scores = grouped.topk(2, dim=-1).values.sum(-1)  # (T, n_group)
    ordered = group_scores.topk(config.topk_group + 1, dim=-1).values
    last_kept, first_left = ordered[:, -2:-1], ordered[:, -1:]  # (T, 1)
    outside = group_scores < last_kept
    inside = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
    if top_k < config.topk_group * per_group:
        ends = inside.topk(top_k + 1, dim=-1).values[:, -2:]
    else:
        ends = inside.topk(top_k, dim=-1).values[:, -1:]
    of_expert = ends.mean(-1, keepdim=True) - biased
    of_group = torch.where(outside, last_kept - group_scores, first_left - group_scores)  # (T, n_group)
    return torch.maximum(of_expert, of_group.repeat_interleave(per_group, dim=1))


@torch.no_grad()
def histogram(needed: Tensor) -> Tensor:
    """Counts of the needs (T, E) by expert and bin: (E, BINS) int64; every row adds up to T."""
    experts = needed.shape[1]
    place = needed.abs().div_(REACH).pow_(1.0 / 3.0).copysign_(needed)
    bins = ((place + 1.0) * (BINS / 2)).long().clamp_(0, BINS - 1)  # (T, E)
    counts = torch.zeros(experts, BINS, dtype=torch.int64, device=needed.device)
    return counts.scatter_add_(1, bins.T, torch.ones_like(bins.T))
