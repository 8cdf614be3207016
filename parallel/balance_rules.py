"""Rules that move the routing bias: pure functions of what one optimizer step's global batch showed.

Every rule works on CPU tensors, one row per MoE layer, from integers: the same counts give the same bias, bit for bit,
however many ranks and micro-batches they were added up from.

# M rows: MoE layers, multi-token-prediction blocks included; E routed experts
"""

import torch
from torch import Tensor

from model.bias_histogram import bin_edges


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
    Source: Wang et al. 2024 (arXiv 2408.15664), algorithm 1; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    shortfall = counts.sum(-1, keepdim=True) - counts * counts.shape[-1]
    return bias + rate * torch.sign(shortfall).to(bias.dtype)


def proportional_rule(counts: Tensor, bias: Tensor, rate: float) -> Tensor:
    """Moves every expert's bias by `rate` times its relative shortfall, (mean - count) / mean.

    Arguments and result as for `sign_rule`. Relative, so that a rate means the same at every batch size; an expert with
    no token moves by `rate`, one with twice its share by `-rate`. A layer without a token keeps its bias.
    Source: Wang et al. 2024 (arXiv 2408.15664), section 4.3, which moves by the shortfall itself.
    """
    total = counts.sum(-1, keepdim=True)
    shortfall = (total - counts * counts.shape[-1]).double() / total.clamp_min(1)
    return bias + (rate * shortfall).to(bias.dtype)


def quantile_rule(needs: Tensor, counts: Tensor, bias: Tensor, rate: float) -> Tensor:
    """Moves every expert's bias to where its share of this batch would have been exact, thresholds held still.

    With a bias moved by d an expert is chosen by the tokens that need less than d; its share is exact where that is
    K T / E of them. This is the exact minimiser along one coordinate of the balanced assignment's dual problem; the
    sign rule takes a step of fixed length along it. A few moves reach equilibrium, as thresholds move with the biases.

    Args:
        needs: (..., E, BINS) int64, how many tokens need how large a move (model/bias_histogram.py), global batch.
        counts: (..., E) int64 tokens per expert over the global batch; only each row's sum, K T, is read.
        bias: (..., E) fp32 current bias.
        rate: fraction of the way; 1 jumps, less averages over about 1 / rate batches.

    Returns:
        (..., E) fp32. A row without a token keeps its bias.

    Source: quantile balancing, Kimi K3 technical report, section 2.3.3 and appendix C.
    """
    edges = bin_edges()
    wanted = counts.sum(-1, keepdim=True).double() / counts.shape[-1]  # (..., 1) tokens of an expert's exact share
    below = needs.cumsum(-1)  # (..., E, BINS)
    # The bin in which the wanted token lies, and the place inside it as if the bin's tokens lay evenly.
    place = (below.double() < wanted.unsqueeze(-1)).sum(-1).clamp_max(needs.shape[-1] - 1)  # (..., E)
    inside = needs.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    before = below.gather(-1, place.unsqueeze(-1)).squeeze(-1) - inside
    fraction = ((wanted - before) / inside.clamp_min(1)).clamp(0.0, 1.0)
    move = edges[place] + fraction * (edges[place + 1] - edges[place])
    move = torch.where(wanted > 0, move, 0.0)
    return bias + (rate * move).to(bias.dtype)


def recentred(bias: Tensor) -> Tensor:
    """The bias (..., E) less its mean over the experts. Choices do not change: all experts of a layer move alike."""
    return (bias.double() - bias.double().mean(-1, keepdim=True)).to(bias.dtype)
