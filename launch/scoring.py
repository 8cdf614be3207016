"""What a model says of given texts: the log-probability of a continuation, and whether it is the greedy one."""

# N pairs, B batch, S positions, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import Transformer

LOGITS_BYTES = 1 << 29  # at most so much for the logits of one forward; a single sequence may take more
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pair:
    """Tokens that are given, and tokens whose probability is asked."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """log_probability: of the continuation after its context, nats, at most 0. greedy: each token is the likeliest."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def score(
    model: Transformer, pairs: Sequence[Pair], window: int, batch_size: int = 8, progress: Progress | None = None
) -> list[Score]:
    """Scores every continuation; the routing bias is read and never moved.

    Pairs of similar length share a forward; what pads the shorter ones lies behind their last token, where a causal
    model does not look, and no token has an expert to itself, so a pair's score does not depend on its company.

    Args:
        model: on one device, with all experts.
        pairs: each with at least one token of context and one of continuation.
        window: tokens of context at most, the training sequence length; of longer pairs the beginning is cut off.
        batch_size: pairs in a forward, fewer where their logits would pass half a GiB.
        progress: called as progress(pairs done, pairs in total).

    Returns:
        One score a pair, in the order given.

    Raises:
        ValueError: an empty context or continuation, a continuation longer than the window, or a token outside the
            vocabulary; every such pair is named by its number.
    """
    _check(pairs, window, model.config.vocab_size)
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: -_length(pairs[i], window))
    found: list[Score | None] = [None] * len(pairs)
    done = 0
    while done < len(order):
        longest = _length(pairs[order[done]], window)
        room = max(1, LOGITS_BYTES // (4 * longest * model.config.vocab_size))
        batch = order[done : done + min(batch_size, room)]
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, i in enumerate(batch):
            given = _tokens(pairs[i], window)[:-1]
            tokens[row, : len(given)] = torch.tensor(given)
        logits = model(tokens.to(device)).logits  # (B, S, V)
        for row, i in enumerate(batch):
            wanted = torch.tensor(list(pairs[i].continuation), device=device)
            end = _length(pairs[i], window)
            found[i] = _score(logits[row, end - len(wanted) : end], wanted)
        done += len(batch)
        if progress:
            progress(done, len(order))
    return [scored for scored in found if scored is not None]


def _score(logits: Tensor, wanted: Tensor) -> Score:
    """logits: (n, V) before each of the n wanted tokens."""
    chosen = torch.log_softmax(logits.float(), -1).gather(1, wanted[:, None])
    return Score(float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all()))


def _tokens(pair: Pair, window: int) -> list[int]:
    return [*pair.context, *pair.continuation][-(window + 1) :]


def _length(pair: Pair, window: int) -> int:
    """Positions that a pair takes in a forward; its last token is only predicted."""
    return min(window, len(pair.context) + len(pair.continuation) - 1)


def _check(pairs: Sequence[Pair], window: int, vocab_size: int) -> None:
    problems = []
    for number, pair in enumerate(pairs):
        if not pair.context or not pair.continuation:
            problems.append(f"pair {number} has an empty {'continuation' if pair.context else 'context'}")
        elif len(pair.continuation) > window:
            problems.append(
                f"pair {number}: its continuation of {len(pair.continuation)} tokens exceeds the window of {window}"
            )
        outside = [token for token in (*pair.context, *pair.continuation) if not 0 <= token < vocab_size]
        if outside:
            problems.append(f"pair {number}: token {outside[0]} is outside the vocabulary of {vocab_size}")
    if problems:
        raise ValueError(
            "; ".join(problems[:10]) + "; give both parts, of the run's own tokenizer, or cut the text into pieces"
        )
