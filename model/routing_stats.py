"""What routing tells about itself: per layer from the router, and collected over the layers of one forward."""

# B batch, S seq, T = B*S tokens, E routed experts, K top-k, M rows: MoE layers, multi-token-prediction blocks included

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Collect:
    """Statistics that are only made where somebody wants them.

    bias_histogram: the needs of every expert's bias, (E, BINS) a layer (model/bias_histogram.py).
    coactivation: how often two experts were chosen together, (E, E) a layer.
    """

    bias_histogram: bool = False
    coactivation: bool = False


class LayerStats(NamedTuple):
    """One layer in one forward. Sums over tokens, so that micro-batches and ranks add up. Only tensors."""

    tokens_per_expert: Tensor  # (E,) int64
    sequence_balance: Tensor  # 0-d fp32, with gradient: sum over sequences of sum_i f_i P_i
    changed_by_bias: Tensor  # 0-d int64: choices that the bias changed
    score_sums: Tensor  # (E,) fp32, with gradient: the scores, each token's normalised over the experts
    gate_entropy: Tensor  # 0-d fp32: entropy of each token's normalised scores, nats
    bias_histogram: Tensor  # (E, BINS) int64, or (E, 0) where not collected
    coactivation: Tensor  # (E, E) int64, or (0, 0) where not collected


class RoutingStats(NamedTuple):
    """What the balancer and the losses need from one forward. Rows in the order of ModelConfig.moe_layers."""

    tokens_per_expert: Tensor  # (M, E) int64; a prediction module's row is zero where no targets were given
    sequence_balance: Tensor  # 0-d fp32, with gradient: sum over layers and sequences, not scaled by its coefficient
    changed_by_bias: Tensor  # (M,) int64: choices that would differ without bias
    score_sums: Tensor  # (M, E) fp32, with gradient
    gate_entropy: Tensor  # (M,) fp32
    bias_histogram: Tensor  # (M, E, BINS) int64, or (M, E, 0)
    coactivation: Tensor  # (M, E, E) int64, or (M, 0, 0)


def stack_layers(layers: Sequence[Sequence[Tensor]], n_rows: int, n_experts: int, device: torch.device) -> RoutingStats:
    """The layers' statistics as rows.

    Args:
        layers: the fields of LayerStats in order, by layer.
        n_rows: M; rows beyond the given layers are zero.
        n_experts: E.
        device: of the result where there is no layer.
    """
    if not layers:
        count = torch.zeros((), dtype=torch.int64, device=device)
        number = torch.zeros((), device=device)
        return RoutingStats(
            tokens_per_expert=count.new_zeros(n_rows, n_experts),
            sequence_balance=number,
            changed_by_bias=count.new_zeros(n_rows),
            score_sums=number.new_zeros(n_rows, n_experts),
            gate_entropy=number.new_zeros(n_rows),
            bias_histogram=count.new_zeros(n_rows, n_experts, 0),
            coactivation=count.new_zeros(n_rows, 0, 0),
        )
    columns = LayerStats(*zip(*layers, strict=True))  # type: ignore[arg-type]  # of each field, all layers
    rows = [_padded(torch.stack(tuple(column)), n_rows) for column in columns]
    return RoutingStats(*rows)._replace(sequence_balance=torch.stack(tuple(columns.sequence_balance)).sum())


def _padded(rows: Tensor, n_rows: int) -> Tensor:
    missing = n_rows - rows.shape[0]
    return rows if not missing else torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))


@torch.no_grad()
def entropy_sum(scores: Tensor, inverse_sums: Tensor) -> Tensor:
    """Sum over tokens of the entropy of p = scores * inverse_sums, nats: (T, E), (T,) -> 0-d.

    It is T ln E for a gate that has no preference and 0 for one that sees a single expert.
    """
    # -sum p ln p with p = s / z is ln z - (sum s ln s) / z
    return -(torch.special.xlogy(scores, scores).sum(-1) * inverse_sums + inverse_sums.log()).sum()


@torch.no_grad()
def count_pairs(topk_ids: Tensor, n_experts: int) -> Tensor:
    """How many tokens chose both of two experts: (T, K) -> (E, E) int64; the diagonal counts single experts."""
    chosen = torch.zeros(topk_ids.shape[0], n_experts, device=topk_ids.device).scatter_(1, topk_ids, 1.0)
    return (chosen.T @ chosen).round().long()  # exact below 2**24 tokens
