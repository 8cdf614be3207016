"""Draft and verify: tokens drafted from one distribution are kept or replaced so that the text follows another."""

# g drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.sampling import Draws


def verify(drafted: Sequence[int], draft: Tensor, target: Tensor, draws: Draws) -> list[int]:
    """Keep the longest run of accepted drafts and add one token of the target's.

    Draft i is accepted with probability min(1, p(d) / q(d)). The first one that is not is replaced by a draw from
    max(0, p - q), normalised; behind g accepted ones a token is drawn from the target's next distribution. The tokens
    are then distributed as if each had been drawn from the target.

    Args:
        drafted: g tokens, g may be 0, draft i drawn from draft[i].
        draft: (g, V) float64, q.
        target: (g + 1, V) float64, p after each of 0 .. g drafts.
        draws: the row's random decisions.

    Returns:
        1 to g + 1 tokens.

    Source: Leviathan, Kalman and Matias 2023, arXiv 2211.17192, algorithm 1 and theorem in appendix A.1.
    """
    kept: list[int] = []
    for place, token in enumerate(drafted):
        p, q = target[place], draft[place]
        if not draws.happens(min(1.0, (p[token] / q[token]).item())):
            left = (p - q).clamp_(min=0.0)
            return [*kept, draws.pick(left / left.sum())]
        kept.append(token)
    return [*kept, draws.pick(target[len(drafted)])]


def verify_greedy(drafted: Sequence[int], best: Sequence[int]) -> list[int]:
    """`verify` where all of the probability is on one token.

    Args:
        best: the target's g + 1 most likely tokens, after each of 0 .. g drafts.
    """
    n_right = next((place for place, token in enumerate(drafted) if token != best[place]), len(drafted))
    return list(best[: n_right + 1])


def draft_token(logits: Tensor, probabilities: Tensor | None, draws: Draws) -> int:
    """A draft from a row's distribution (V,), or the most likely token of logits (V,) where that is None."""
    return int(logits.argmax()) if probabilities is None else draws.pick(probabilities)


def stacked(rows: Sequence[Tensor], vocab_size: int) -> Tensor:
    """g tensors (V,) as (g, V) float64, also for g = 0."""
    return torch.stack(list(rows)) if rows else torch.zeros(0, vocab_size, dtype=torch.float64)
