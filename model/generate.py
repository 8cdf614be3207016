"""Completion of prompts: one at a time as an iterator of tokens, without and with the latent cache."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.decoder import can_cache
from model.generation import Generation, Request, context_limit, request_problems, restart_length
from model.sampling import Sampling, SeededDraws, distributions
from model.transformer import Transformer


@torch.no_grad()
def next_logits(model: Transformer, context: list[int]) -> Tensor:
    """Logits (V,) fp32 of the token after `context`, on the model's device; the whole context is computed."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([context], dtype=torch.int64, device=device)).logits
    return logits[0, -1].float()


def generate(
    model: Transformer,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eod_id: int | None = None,
    max_context: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Yield new tokens until the count is reached or a document ends.

    The prompt starts a document: training sees `eod_id` before a document's first token, so a caller that wants the
    same begins the prompt with it. With expert parallelism every rank must call this with the same arguments. Where a
    sharding engine holds the weights, the whole context is computed again for every token.

    Args:
        prompt_ids: at least one token, each in [0, V).
        max_new_tokens: at most so many are yielded.
        temperature, top_k, top_p: see model.sampling.Sampling.
        seed: of the draws.
        eod_id: stops the generation and is not yielded; None for none.
        max_context: tokens that are looked at, see model.generation; None for max_position_embeddings, which caps it.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, sampling out of range, a context below 1.
    """
    sampling = Sampling(temperature, top_k, top_p)
    limit = context_limit(model.config, max_context)
    request = Request(list(prompt_ids), max_new_tokens, seed)
    found = [*request_problems(request, model.config.vocab_size), *sampling.problems()]
    if limit < 1:
        found.append(f"max_context = {limit} must be at least 1 token")
    if found:
        raise ValueError("; ".join(found))
    if not can_cache(model):
        return _uncached(model, request, sampling, eod_id, limit)
    return _cached(Generation(model, [request], sampling, eod_id=eod_id, max_context=limit))


def _cached(generation: Generation) -> Iterator[int]:
    while not generation.done:
        for event in generation.step():
            yield from event.tokens


def _uncached(
    model: Transformer, request: Request, sampling: Sampling, eod_id: int | None, limit: int
) -> Iterator[int]:
    draws = SeededDraws(request.seed)
    context = request.prompt_ids[-limit:]
    for _ in range(request.max_new_tokens):
        token = draws.pick(distributions(next_logits(model, context), sampling))
        if token == eod_id:
            return
        yield token
        context.append(token)
        if len(context) > limit:
            context = context[-restart_length(limit) :]
