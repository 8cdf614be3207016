"""Triton kernels of the router after its product: one pass forward, one backward."""

# B sequences, S tokens of a sequence, T = B*S tokens, E experts, K top-k, G groups

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from kernels.router_topk import RouterRule

# Tokens of a program times experts: its values stay in registers.
VALUES = 2048


@triton.jit
def take_best(values, places, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Each row's greatest value's place, the lowest among equals, and the values without it."""
    best = tl.argmax(values, axis=1, tie_break_left=True)
    hit = places == best[:, None]
    return best, hit, tl.where(hit, float("-inf"), values)


@triton.jit
def limit_groups(
    values, places, GROUPS: tl.constexpr, PER: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, ROWS: tl.constexpr
):
    """Minus infinity for what lies outside each row's KEPT best groups, a group's score being the sum of its BEST best.
    Places past the experts hold minus infinity already; GROUPS and PER are powers of two that cover them."""
    grouped = tl.reshape(values, (ROWS, GROUPS, PER))
    inside_group = tl.arange(0, PER)[None, None, :]
    left = grouped
    scores = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    for _ in tl.static_range(BEST):
        scores += tl.max(left, axis=2)
        left = tl.where(inside_group == tl.argmax(left, axis=2, tie_break_left=True)[:, :, None], float("-inf"), left)
    groups = tl.arange(0, GROUPS)[None, :] + tl.zeros((ROWS, 1), dtype=tl.int32)
    kept = tl.zeros((ROWS, GROUPS), dtype=tl.int32)
    for _ in tl.static_range(KEPT):
        _best, hit, scores = take_best(scores, groups, ROWS, GROUPS)
        kept += hit.to(tl.int32)
    return tl.reshape(tl.where(kept[:, :, None] > 0, grouped, float("-inf")), (ROWS, GROUPS * PER))


@triton.jit
def forward_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scores_ptr, counts_ptr, changed_ptr, seq_len, n_experts, per_group,
    scaling,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, LIMITED: tl.constexpr,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    GROUPS: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sequence. An expert stands at place group * PER + its place in the group."""
    WIDE: tl.constexpr = GROUPS * PER
    sequence = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = sequence * seq_len + within
    mine = within < seq_len
    place = tl.arange(0, WIDE)
    expert = place // PER * per_group + place % PER
    exists = (place % PER < per_group) & (expert < n_experts)
    places = place[None, :] + tl.zeros((ROWS, 1), dtype=tl.int32)
    mask = mine[:, None] & exists[None, :]
    at = tokens[:, None] * n_experts + expert[None, :]
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(exists[None, :], logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    tl.store(scores_ptr + at, scores, mask=mask)
    plain = tl.where(exists[None, :], scores, float("-inf"))
    biased = plain
    if BIAS:
        biased += tl.load(bias_ptr + expert, mask=exists, other=0.0)[None, :]
    if LIMITED:
        biased = limit_groups(biased, places, GROUPS, PER, KEPT, BEST, ROWS)
    k = tl.arange(0, K_BLOCK)
    ids = tl.zeros((ROWS, K_BLOCK), dtype=tl.int32)
    picked = tl.zeros((ROWS, K_BLOCK), dtype=tl.float32)
    chosen = tl.zeros((ROWS, WIDE), dtype=tl.int32)
    for step in tl.static_range(TOP_K):
        best, hit, biased = take_best(biased, places, ROWS, WIDE)
        now = (k == step)[None, :]
        number = tl.minimum(best // PER * per_group + best % PER, n_experts - 1)  # a NaN could point past the last
        ids = tl.where(now, number[:, None], ids)
        picked = tl.where(now, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], picked)
        chosen += hit.to(tl.int32)
    weights = picked * scaling
    if NORMALISE:
        weights = weights / (tl.sum(picked, axis=1) + 1e-20)[:, None]
    out = tokens[:, None] * TOP_K + k[None, :]
    stored = mine[:, None] & (k < TOP_K)[None, :]
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=stored)
    tl.store(weights_ptr + out, weights, mask=stored)
    # Whole numbers: the order in which programs add them does not show.
    chosen = tl.where(mine[:, None], chosen, 0)
    counts = tl.sum(chosen, axis=0)
    tl.atomic_add(counts_ptr + sequence * n_experts + expert, counts.to(tl.int64), mask=exists & (counts > 0))
    if BIAS:
        if LIMITED:
            plain = limit_groups(plain, places, GROUPS, PER, KEPT, BEST, ROWS)
        same = tl.zeros((ROWS, WIDE), dtype=tl.int32)
        for _ in tl.static_range(TOP_K):
            _best, hit, plain = take_best(plain, places, ROWS, WIDE)
            same += hit.to(tl.int32)
        changed = tl.sum(tl.sum(tl.where(same > 0, 0, chosen), axis=1), axis=0)
        tl.atomic_add(changed_ptr, changed.to(tl.int64))


@triton.jit
def backward_kernel(
    grad_weights_ptr, grad_scores_ptr, scores_ptr, ids_ptr, out_ptr, n_tokens, n_experts, scaling,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: through normalisation and choice to all scores, and through the scoring function."""
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = tokens < n_tokens
    k = tl.arange(0, K_BLOCK)
    listed = mine[:, None] & (k < TOP_K)[None, :]
    at = tokens[:, None] * TOP_K + k[None, :]
    grad_picked = tl.load(grad_weights_ptr + at, mask=listed, other=0.0) * scaling
    ids = tl.load(ids_ptr + at, mask=listed, other=-1)
    if NORMALISE:
        picked = tl.load(scores_ptr + tokens[:, None] * n_experts + ids, mask=listed, other=0.0)
        total = (tl.sum(picked, axis=1) + 1e-20)[:, None]
        grad_picked = (grad_picked - tl.sum(grad_picked * picked, axis=1)[:, None] / total) / total
    expert = tl.arange(0, WIDE)
    mask = mine[:, None] & (expert < n_experts)[None, :]
    place = tokens[:, None] * n_experts + expert[None, :]
    grad = tl.load(grad_scores_ptr + place, mask=mask, other=0.0)
    for step in tl.static_range(TOP_K):
        now = (k == step)[None, :]
        number = tl.sum(tl.where(now, ids, 0), axis=1)
        value = tl.sum(tl.where(now, grad_picked, 0.0), axis=1)
        grad += tl.where(expert[None, :] == number[:, None], value[:, None], 0.0)
    scores = tl.load(scores_ptr + place, mask=mask, other=0.0)
    if SIGMOID:
        out = grad * scores * (1.0 - scores)
    else:
        out = scores * (grad - tl.sum(grad * scores, axis=1)[:, None])
    tl.store(out_ptr + place, out, mask=mask)


class TritonRouter(torch.autograd.Function):
    """Same arguments, values and gradients as the reference in kernels/router_topk.py."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, rule: RouterRule, n_sequences: int
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        n_tokens, experts = logits.shape
        device = logits.device
        topk_ids = torch.empty(n_tokens, rule.top_k, dtype=torch.int64, device=device)
        weights = torch.empty(n_tokens, rule.top_k, dtype=torch.float32, device=device)
        scores = torch.empty_like(logits)
        counts = torch.zeros(n_sequences, experts, dtype=torch.int64, device=device)
        changed = torch.zeros((), dtype=torch.int64, device=device)
        limited = rule.topk_group < rule.n_group
        groups, per_group = (rule.n_group, experts // rule.n_group) if limited else (1, experts)
        blocks = triton.next_power_of_2(groups), triton.next_power_of_2(per_group)
        rows = max(1, VALUES // (blocks[0] * blocks[1]))
        seq_len = n_tokens // n_sequences
        if n_tokens:
            forward_kernel[(triton.cdiv(seq_len, rows), n_sequences)](
                logits, logits if bias is None else bias.contiguous(), topk_ids, weights, scores, counts, changed,
                seq_len, experts, per_group, float(rule.scaling),
                SIGMOID=rule.scoring == "sigmoid", BIAS=bias is not None, NORMALISE=rule.normalise, LIMITED=limited,
                TOP_K=rule.top_k, K_BLOCK=triton.next_power_of_2(rule.top_k), KEPT=rule.topk_group,
                BEST=rule.group_best, GROUPS=blocks[0], PER=blocks[1], ROWS=rows,
            )  # fmt: skip
        ctx.save_for_backward(scores, topk_ids)
        ctx.rule = rule
        ctx.mark_non_differentiable(topk_ids, counts, changed)
        return topk_ids, weights, scores, counts, changed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, topk_ids = ctx.saved_tensors
        _, grad_weights, grad_scores, _, _ = grads
        rule: RouterRule = ctx.rule
        out = torch.empty_like(scores)
        n_tokens, experts = scores.shape
        wide = triton.next_power_of_2(experts)
        rows = max(1, VALUES // wide)
        if n_tokens:
            backward_kernel[(triton.cdiv(n_tokens, rows),)](
                grad_weights.contiguous(), grad_scores.contiguous(), scores, topk_ids, out, n_tokens, experts,
                float(rule.scaling),
                SIGMOID=rule.scoring == "sigmoid", NORMALISE=rule.normalise, TOP_K=rule.top_k,
                K_BLOCK=triton.next_power_of_2(rule.top_k), WIDE=wide, ROWS=rows,
            )  # fmt: skip
        return out, None, None, None
