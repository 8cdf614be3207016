"""The router after its product: scores, bias, group limit, top-k, weights and counts; ties go to the lowest index."""

# B sequences, S tokens of a sequence, T = B*S tokens, E experts, K top-k, G groups

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from kernels.backend import Backend, resolve, size_class


class RouterRule(NamedTuple):
    """How a router chooses and weighs; names as in DeepseekV3Config.

    `group_best`: a group's score is the sum of so many of its best biased scores (2 with a bias, 1 without).
    `topk_group` equal to `n_group` means no group limit.
    """

    top_k: int
    scoring: Literal["sigmoid", "softmax"]
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 2
    normalise: bool = True
    scaling: float = 1.0


class RouterChoice(NamedTuple):
    """What the router decided."""

    topk_ids: Tensor  # (T, K) int64, the best biased score first
    topk_weights: Tensor  # (T, K) fp32, with gradient
    scores: Tensor  # (T, E) fp32, with gradient
    counts: Tensor  # (B, E) int64: tokens of each sequence that chose each expert
    changed: Tensor  # 0-d int64: choices that would not have been made without the bias


def router_topk(
    logits: Tensor, bias: Tensor | None, rule: RouterRule, n_sequences: int = 1, backend: Backend = "auto"
) -> RouterChoice:
    """Score, choose, weigh and count.

    Args:
        logits: (T, E) fp32, T a multiple of n_sequences.
        bias: (E,) fp32, added to the scores for the choice only; None for no bias.
        rule: how to choose.
        n_sequences: B.
        backend: `reference`, `triton` (a GPU, or Triton's interpreter), or `auto`.

    Raises:
        ValueError: the rule does not fit E, or logits are not fp32.

    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, DeepSeek-V2 (arXiv 2405.04434) section 2.1.4.
    """
    _check(logits, rule, n_sequences)

    def run(name: str) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            made = router_topk(leaf, bias, rule, n_sequences, cast(Backend, name))
            (grad,) = torch.autograd.grad(made.topk_weights.square().sum() + made.scores.square().sum(), leaf)
        return [made.topk_weights.detach(), made.scores.detach(), made.counts, grad]

    shapes = (size_class(logits.shape[0]), logits.shape[1], *rule[:6], bias is None)
    if resolve("router_topk", backend, logits, run, shapes) == "triton":
        from kernels.router_topk_triton import TritonRouter

        return RouterChoice(*TritonRouter.apply(logits, bias, rule, n_sequences))
    return RouterChoice(*_Router.apply(logits, bias, rule, n_sequences))


def _check(logits: Tensor, rule: RouterRule, n_sequences: int) -> None:
    experts = logits.shape[-1]
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"router_topk: logits {tuple(logits.shape)} {logits.dtype}; they must be (T, E) float32")
    if n_sequences < 1 or logits.shape[0] % n_sequences:
        raise ValueError(f"router_topk: {logits.shape[0]} tokens are no {n_sequences} sequences of one length")
    if rule.scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"router_topk: scoring {rule.scoring!r}; use sigmoid or softmax")
    if rule.n_group < 1 or experts % rule.n_group or not 1 <= rule.topk_group <= rule.n_group:
        raise ValueError(
            f"router_topk: n_group {rule.n_group} and topk_group {rule.topk_group} do not fit {experts} experts; "
            "n_group must divide them and topk_group be at most n_group"
        )
    reachable = experts // rule.n_group * rule.topk_group
    if not 1 <= rule.top_k <= reachable or not 1 <= rule.group_best <= experts // rule.n_group:
        raise ValueError(
            f"router_topk: top_k {rule.top_k} of {reachable} experts within reach, group_best {rule.group_best} of "
            f"{experts // rule.n_group} in a group; both must be at least 1 and at most that many"
        )


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, rule: RouterRule, n_sequences: int
    ) -> tuple[Tensor, ...]:
        scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
        topk_ids = choose(scores if bias is None else scores + bias, rule)
        picked = scores.gather(1, topk_ids)
        weights = picked * rule.scaling
        if rule.normalise:
            weights /= picked.sum(-1, keepdim=True) + 1e-20
        counts = torch.zeros(n_sequences, logits.shape[1], dtype=torch.int64, device=logits.device)
        by_sequence = topk_ids.view(n_sequences, -1)
        counts.scatter_add_(1, by_sequence, torch.ones_like(by_sequence))
        changed = counts.new_zeros(())
        if bias is not None:
            plain = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            plain.scatter_(1, choose(scores, rule), True)
            changed = topk_ids.numel() - plain.gather(1, topk_ids).sum()
        ctx.save_for_backward(scores, topk_ids, picked)
        ctx.rule = rule
        ctx.mark_non_differentiable(topk_ids, counts, changed)
        return topk_ids, weights, scores, counts, changed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, topk_ids, picked = ctx.saved_tensors
        _, grad_weights, grad_scores, _, _ = grads
        rule: RouterRule = ctx.rule
        grad_picked = grad_weights * rule.scaling
        if rule.normalise:
            total = picked.sum(-1, keepdim=True) + 1e-20
            grad_picked = (grad_picked - (grad_picked * picked).sum(-1, keepdim=True) / total) / total
        grad = grad_scores.scatter_add(1, topk_ids, grad_picked)
        if rule.scoring == "sigmoid":
            return grad * scores * (1 - scores), None, None, None
        return scores * (grad - (grad * scores).sum(-1, keepdim=True)), None, None, None


def choose(biased: Tensor, rule: RouterRule) -> Tensor:
    """The K best experts of each token inside its best groups, best first, equals by index: (T, E) -> (T, K) int64."""
    if rule.topk_group < rule.n_group:
        grouped = biased.view(biased.shape[0], rule.n_group, -1)
        group_scores = grouped.topk(rule.group_best, dim=-1, sorted=False).values.sum(-1)  # (T, G)
        kept = _best(group_scores, rule.topk_group)
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        # Minus infinity and not zero: a biased score may be negative, and zero would then win.
        biased = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
    return _best(biased, rule.top_k)


def _best(values: Tensor, k: int) -> Tensor:
    """Indices of the k greatest of each row, the greatest first, equals in the order of index.

    torch.topk leaves open which of two equals it takes. It is several times faster than a stable sort, and where the
    k + 1 greatest all differ there is nothing to leave open.
    """
    # On a GPU a look at the values would wait for the device, and a sort is quick.
    if not values.is_cuda:
        top = values.topk(min(k + 1, values.shape[1]), dim=-1)
        if not bool((top.values[:, 1:] == top.values[:, :-1]).any()):
            return top.indices[:, :k].contiguous()
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
