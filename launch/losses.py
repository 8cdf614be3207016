"""From the model's per-token losses to one number to differentiate: sums over tokens, divided by global counts.

# B batch, S seq; depth 0 is the main head, depth k the k-th multi-token-prediction module
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.real_tokens import same_document_ahead
from model.transformer import ModelOutput


@dataclass(frozen=True)
class Weights:
    """mtp: weight of the mean over depths. sequence_balance, batch_balance: coefficients of the sequence-wise balance
    loss and of the one over the global batch."""

    mtp: float
    sequence_balance: float
    batch_balance: float = 0.0


@dataclass(frozen=True)
class Losses:
    """total: this rank's and micro-step's share of the global loss; all ranks' and micro-steps' shares add up to it.

    sums: (1 + depths + 2,) fp64 without gradient: loss sums by depth, then the sequence-wise balance sum, then this
        share of the global batch's balance loss (zero where it was not asked for).
    """

    total: Tensor
    sums: Tensor


def target_masks(loss_mask: Tensor, depths: int, doc_ids: Tensor | None = None) -> list[Tensor]:
    """Which positions have a target, by depth: (B, S) bool each.

    At depth k position t predicts what depth 0 predicts at t + k, where that is of the same document; the last k
    positions of a sequence, and of each document in it, have no such target.

    Args:
        loss_mask: (B, S) bool, of depth 0.
        depths: prediction modules.
        doc_ids: (B, S) integers, non-decreasing along S; None for one document a sequence.
    """
    masks = [loss_mask]
    for depth in range(1, depths + 1):
        mask = torch.zeros_like(loss_mask)
        ahead = loss_mask[:, depth:]
        mask[:, :-depth] = ahead if doc_ids is None else ahead & same_document_ahead(doc_ids, depth)
        masks.append(mask)
    return masks


def target_counts(loss_masks: Sequence[Tensor], depths: int, doc_ids: Sequence[Tensor | None] | None = None) -> Tensor:
    """(1 + depths,) int64: targets by depth in one rank's micro-batches of a step, from what `target_masks` takes."""
    documents = [None] * len(loss_masks) if doc_ids is None else doc_ids
    per_batch = [
        [int(mask.sum()) for mask in target_masks(loss_mask, depths, ids)]
        for loss_mask, ids in zip(loss_masks, documents, strict=True)
    ]
    return torch.tensor(per_batch, dtype=torch.int64).sum(0)


def batch_balance(score_sums: Tensor, expert_counts: Tensor, top_k: int) -> Tensor:
    """One micro-batch's share of the balance loss over the global batch, summed over layers; 1 a layer when even.

    A layer's loss is E * sum_i f_i P_i, f_i the share of all choices that fell on expert i, P_i the mean normalised
    score. f has no gradient, so the loss is linear in P: the shares of ranks and micro-batches add up to it exactly.

    Args:
        score_sums: (M, E) fp32, with gradient: normalised scores summed over the micro-batch's tokens.
        expert_counts: (M, E) int64, choices of the whole global batch.

    Source: Fedus et al. 2021, Switch Transformers (arXiv 2101.03961), equations 4-6, for top-k and with f over the
    global batch as in Qiu et al. 2025 (arXiv 2501.11873).
    """
    counts = expert_counts.to(score_sums.device).double()
    choices = counts.sum(-1, keepdim=True).clamp_min(1.0)  # (M, 1): K T
    weights = counts * (counts.shape[-1] * top_k) / choices.square()  # (M, E): E f_i / T
    return (weights.float() * score_sums).sum()


def compute_losses(
    output: ModelOutput,
    loss_mask: Tensor,
    global_counts: list[int],
    n_sequences: int,
    weights: Weights,
    balance_loss: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Losses:
    """Combines main, multi-token-prediction and balance losses.

    Args:
        output: of one micro-batch, with token losses.
        loss_mask: (B, S) bool on the model's device.
        global_counts: targets by depth over the whole global batch.
        n_sequences: sequences in the global batch that hold a real token.
        weights: see `Weights`.
        balance_loss: this micro-batch's `batch_balance`, where wanted.
        doc_ids: (B, S) of the micro-batch; None for one document a sequence.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17-20 (sequence balance) and 24-25 (multi-token prediction).
    """
    assert output.token_losses is not None, "the model was called without targets"
    per_depth = [output.token_losses, *output.mtp_token_losses]
    masks = target_masks(loss_mask, len(per_depth) - 1, doc_ids)
    sums = [(losses * mask).sum() for losses, mask in zip(per_depth, masks, strict=True)]
    total = sums[0] / max(1, global_counts[0])
    for depth in range(1, len(sums)):
        total = total + sums[depth] * (weights.mtp / (len(sums) - 1) / max(1, global_counts[depth]))
    balance = output.routing.sequence_balance
    if weights.sequence_balance > 0:
        total = total + balance * (weights.sequence_balance / max(1, n_sequences))
    if balance_loss is not None:
        total = total + balance_loss * weights.batch_balance
    sums += [balance, balance.new_zeros(()) if balance_loss is None else balance_loss]
    return Losses(total, torch.stack([one.detach().double() for one in sums]))
