"""Completion of a prompt, one token at a time; every token computes the whole context again."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.no_grad()
def next_logits(model: Transformer, context: list[int]) -> Tensor:
    """Logits (V,) fp32 of the token after `context`, on the model's device."""
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
) -> Iterator[int]:
    """Yield new tokens until the count is reached or a document ends.

    The prompt starts a document: training sees `eod_id` before a document's first token, so a caller that wants the
    same begins the prompt with it. With expert parallelism every rank must call this with the same arguments.

    Args:
        prompt_ids: at least one token, each in [0, V).
        max_new_tokens: at most so many are yielded.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        seed: of the draws.
        eod_id: stops the generation and is not yielded; None for none.
        max_context: only so many last tokens are looked at; None for the configuration's max_position_embeddings.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a negative temperature, a context below 1.
    """
    limit = model.config.max_position_embeddings if max_context is None else max_context
    _check(prompt_ids, model.config.vocab_size, temperature, limit)
    return _tokens(model, list(prompt_ids), max_new_tokens, temperature, seed, eod_id, limit)


def _tokens(
    model: Transformer,
    context: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eod_id: int | None,
    limit: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = next_logits(model, context[-limit:]).cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == eod_id:
            return
        yield token
        context.append(token)


def _check(prompt_ids: list[int], vocab_size: int, temperature: float, limit: int) -> None:
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token, for example the end-of-document token")
    outside = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"prompt token {outside[0]} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    if temperature < 0:
        raise ValueError(f"temperature = {temperature} is negative; use 0 for the most likely token")
    if limit < 1:
        raise ValueError(f"max_context = {limit} must be at least 1 token")
