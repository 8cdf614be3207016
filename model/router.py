"""Which experts a token goes to and with what weight; the statistics that balancing needs."""

# B batch, S seq, T = B*S tokens, D hidden, E routed experts, K top-k

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bias_histogram import bias_needed, histogram
from model.config import ModelConfig
from model.real_tokens import RealTokens
from model.routing_stats import Collect, LayerStats, count_pairs, entropy_sum


class RoutingMemory:
    """One layer in one forward: what to collect, and the choice, kept so that recomputation makes the same one.

    A near-tie may flip when scores are computed again (another kernel, another batch shape), and then tensors no longer
    match what other ranks expect. A plain object, since hooks that walk arguments copy lists but leave objects alone.
    """

    def __init__(self, collect: Collect | None = None) -> None:
        self.collect = collect or Collect()
        self.topk_ids: Tensor | None = None


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
        # Set by a benchmark that compares with forced routing: stands in for `choose_experts`.
        self.choose: Callable[[Tensor, Tensor | None, ModelConfig], Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Every cast or move of a module passes here. The bias follows to the device but never leaves fp32: its steps
        of 0.001 are lost in bfloat16, and a cast there and back would keep the rounding."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def forward(
        self, x: Tensor, memory: RoutingMemory | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, ...]:
        """Score, choose, weigh, count.

        Args:
            x: (B, S, D); with `real` (N, D), the real tokens alone, and T is N below.
            memory: where given, the choice is left in it; a forward that finds one there is a recomputation: it takes
                that choice, and of the statistics makes those with a gradient only.
            real: where the tokens stand in their sequences; None where every position holds one.

        Returns:
            topk_ids (T, K) int64, topk_weights (T, K) fp32 with gradient, then the fields of LayerStats; a plain tuple.
        """
        # Autocast would round the sums of scores and the counts of pairs, which are products too, to bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            return self._route(x, memory or RoutingMemory(), real)

    def _route(self, x: Tensor, memory: RoutingMemory, real: RealTokens | None) -> tuple[Tensor, ...]:
        config = self.config
        logits = F.linear(x.reshape(-1, x.shape[-1]).float(), self.weight.float())  # (T, E)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        topk_ids, recomputed = memory.topk_ids, memory.topk_ids is not None
        plain = scores.detach()
        bias = self.e_score_correction_bias if config.uses_bias else None
        if topk_ids is None:
            topk_ids = memory.topk_ids = (self.choose or choose_experts)(plain, bias, config)
        topk_weights = weigh(scores, topk_ids, config)
        inverse_sums = scores.sum(-1).add(1e-20).reciprocal()  # (T,)
        if real is None:
            batch, seq_len = x.shape[:2]
            lengths: int | Tensor = seq_len
            counts = count_tokens(topk_ids.view(batch, -1), config.n_routed_experts)  # (B, E)
            by_position = inverse_sums, scores
        else:
            batch, seq_len, lengths = real.batch, real.seq_len, real.lengths
            counts = count_by_sequence(topk_ids, real, config.n_routed_experts)
            by_position = real.spread(inverse_sums), real.spread(scores)  # zero at padding: it adds nothing
        by_sequence = by_position[1].view(batch, seq_len, -1)
        # sum_t(s_ti / sum_j s_tj), as one product of the (S) inverse sums with the (S, E) scores for each sequence
        score_sums = torch.bmm(by_position[0].view(batch, 1, seq_len), by_sequence).squeeze(1)  # (B, E)
        balance = sequence_balance(score_sums, counts, config.num_experts_per_tok, lengths)
        with torch.no_grad():
            observed = self._observe(plain, inverse_sums.detach(), topk_ids, bias, memory.collect, recomputed)
        changed, entropy, needs, pairs = observed
        stats = LayerStats(counts.sum(0), balance, changed, score_sums.sum(0), entropy, needs, pairs)
        return (topk_ids, topk_weights, *stats)

    def _observe(
        self,
        scores: Tensor,
        inverse_sums: Tensor,
        topk_ids: Tensor,
        bias: Tensor | None,
        collect: Collect,
        recomputed: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """changed_by_bias, gate_entropy, bias_histogram and coactivation of LayerStats."""
        config = self.config
        changed, entropy = topk_ids.new_zeros(()), scores.new_zeros(())
        needs, pairs = topk_ids.new_zeros((config.n_routed_experts, 0)), topk_ids.new_zeros((0, 0))
        if recomputed:  # nobody reads them a second time
            return changed, entropy, needs, pairs
        entropy = entropy_sum(scores, inverse_sums)
        if bias is not None:
            changed = count_changed(topk_ids, scores, config)
            if collect.bias_histogram:
                needs = histogram(bias_needed(scores + bias, config))
        if collect.coactivation:
            pairs = count_pairs(topk_ids, config.n_routed_experts)
        return changed, entropy, needs, pairs


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
    if config.limits_groups:
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


def count_by_sequence(topk_ids: Tensor, real: RealTokens, n_experts: int) -> Tensor:
    """How often each expert was chosen in each sequence by its real tokens: (N, K) -> (B, E) int64."""
    places = (real.sequence.unsqueeze(1) * n_experts + topk_ids).flatten()
    counts = topk_ids.new_zeros(real.batch * n_experts)
    return counts.scatter_add_(0, places, torch.ones_like(places)).view(real.batch, n_experts)


def sequence_balance(score_sums: Tensor, counts: Tensor, top_k: int, lengths: int | Tensor) -> Tensor:
    """Sequence-wise balance: sum over sequences of sum_i f_i P_i, without its coefficient.

    f_i = E / (K S) * (tokens of the sequence that chose expert i), P_i = mean over the sequence of the score
    normalised over all experts. It is 1 for a sequence in perfect balance, and 0 for one that is all padding.

    Args:
        score_sums: (B, E) fp32, with gradient: the sequence's normalised scores, summed over its S tokens.
        counts: (B, E) int64, of the choices that were made, bias included.
        lengths: S, or (B,) int64 real tokens of each sequence where these differ.

    Source: DeepSeek-V3 (arXiv 2412.19437) equations 17-20.
    """
    if isinstance(lengths, Tensor):
        each = lengths.clamp_min(1).float().unsqueeze(1)  # (B, 1)
        frequency = counts.float() * (counts.shape[-1] / (top_k * each))  # (B, E)
        return (frequency * score_sums / each).sum()
    frequency = counts.float() * (counts.shape[-1] / (top_k * lengths))  # (B, E)
    return (frequency * score_sums).sum() / lengths


@torch.no_grad()
def count_changed(topk_ids: Tensor, scores: Tensor, config: ModelConfig) -> Tensor:
    """How many of the choices (T, K) would not have been made without bias: 0-d int64."""
    plain = choose_experts(scores, None, config)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, plain, True)
    return topk_ids.numel() - chosen.gather(1, topk_ids).sum()
