"""Generation for many requests at once: rows of a batch that begin, advance and end each at its own time."""

# R rows of the batch, N tokens of a forward (packed), V vocabulary, g drafts

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder, can_cache
from model.drafts import Draft, Drafter, DraftRow
from model.sampling import Draws, Sampling, SeededDraws, distributions
from model.speculative import stacked, verify, verify_greedy
from model.transformer import Transformer


class Request(NamedTuple):
    """A prompt, at least one token; how many new tokens at most; the seed of its draws."""

    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0


class Event(NamedTuple):
    """What one step did for one request."""

    request: int  # its number, from 0
    tokens: list[int]  # new ones, in order; none where the document ended at once
    finished: Literal["", "eod", "length"]  # the end token was drawn, or max_new_tokens are reached


@dataclass
class Counts:
    """What a generation took: forwards of the model after the prompts, drafts made and kept, new tokens."""

    steps: int = 0
    rows: int = 0  # summed over steps
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float | None:
        """Part of the drafts that were kept; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None


def restart_length(limit: int) -> int:
    """Tokens that a context of more than `limit` tokens restarts with: its last half.

    A token's position is part of its cached key, so a window that slid by one token would have to be computed as a
    whole for every token. So it slides by half its length at once, and no position at or past `limit` is ever used.
    """
    return max(1, limit // 2)


def context_limit(config: ModelConfig, max_context: int | None) -> int:
    """Tokens that a context may hold: never more than the positions that the model is configured for."""
    return config.max_position_embeddings if max_context is None else min(max_context, config.max_position_embeddings)


def request_problems(request: Request, vocab_size: int) -> list[str]:
    """Every reason why a request cannot be served."""
    found = []
    if not request.prompt_ids:
        found.append("the prompt is empty; give at least one token, for example the end-of-document token")
    outside = [token for token in request.prompt_ids if not 0 <= token < vocab_size]
    if outside:
        found.append(
            f"prompt token {outside[0]} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return found


@dataclass
class _Row:
    """A request in its place in the batch. Its cache holds all of `context` but the last token."""

    request: int
    context: list[int]
    left: int  # new tokens that it may still get
    draws: Draws
    drafts: Draft = field(default_factory=lambda: Draft([], []))


class Generation:
    """Steps through requests, `batch` at a time; a row that ends makes room for the next request.

    A row's tokens depend on its request alone, but for the rounding of products of another number of rows. A context
    holds at most `max_context` tokens: of a longer prompt the last ones count, and a text that outgrows it goes on
    from its last half (`restart_length`).
    """

    def __init__(
        self,
        model: Transformer,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        eod_id: int | None = None,
        max_context: int | None = None,
        batch: int = 8,
        drafter: Callable[[int], Drafter] | None = None,
        draws: Callable[[int], Draws] = SeededDraws,
    ) -> None:
        """Prepare.

        Args:
            eod_id: ends a row and is not among its tokens; None for none.
            max_context: tokens; None for max_position_embeddings, which also caps it.
            batch: rows at a time.
            drafter: makes the drafter for so many rows; None for plain decoding.
            draws: a row's random decisions from its seed.

        Raises:
            ValueError: everything that is wrong with the requests and the sampling.
        """
        limit = context_limit(model.config, max_context)
        found = sampling.problems()
        for number, request in enumerate(requests):
            found += [f"request {number}: {text}" for text in request_problems(request, model.config.vocab_size)]
        if limit < 1 or batch < 1:
            found.append(f"max_context = {limit} and batch = {batch} must both be at least 1")
        if not can_cache(model):
            found.append("the model's weights are not all here; load a checkpoint into one process")
        if found:
            raise ValueError("; ".join(found))
        self._sampling, self._eod_id, self._limit, self._draws = sampling, eod_id, limit, draws
        self._waiting = deque(number for number, request in enumerate(requests) if request.max_new_tokens > 0)
        self._requests = list(requests)
        n_rows = min(batch, len(self._waiting))
        self._decoder = Decoder(model, n_rows)
        self._drafter = drafter(n_rows) if drafter else None
        self._rows: list[_Row | None] = [None] * n_rows
        self.counts = Counts()

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return not self._waiting and not any(self._rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the decoder layers' cache buffers."""
        return self._decoder.cache.nbytes

    def cancel(self, request: int) -> None:
        """Ends a request, for example at a stop string."""
        self._rows = [None if row is not None and row.request == request else row for row in self._rows]
        if request in self._waiting:
            self._waiting.remove(request)

    def step(self) -> list[Event]:
        """One forward for all rows, with the forwards that begin new rows before it; at least a token for each."""
        self._fill()
        active = [(place, row) for place, row in enumerate(self._rows) if row is not None]
        if not active:
            return []
        self._draft(active)
        fed = [[row.context[-1], *row.drafts.tokens] for _, row in active]
        hidden, span = self._decoder.extend([place for place, _ in active], fed)
        self.counts.steps += 1
        self.counts.rows += len(active)
        chosen = self._choose(self._decoder.logits(hidden), span.counts, [row for _, row in active])
        events = []
        for (place, row), states, tokens in zip(active, span.of_rows(hidden), chosen, strict=True):
            events.append(self._advance(place, row, states, tokens))
        return events

    def _fill(self) -> None:
        """Begins waiting requests in free places; with none waiting, drops free places. Restarts contexts too long."""
        begun = []
        for place, row in enumerate(self._rows):
            if row is None and self._waiting:
                number = self._waiting.popleft()
                prompt, left, seed = self._requests[number]
                self._rows[place] = _Row(number, list(prompt[-self._limit :]), left, self._draws(seed))
                begun.append(place)
            elif row is not None and len(row.context) > self._limit:
                row.context = row.context[-restart_length(self._limit) :]
                begun.append(place)
        if None in self._rows and any(self._rows):
            kept = [place for place, row in enumerate(self._rows) if row is not None]
            self._decoder.cache.select(kept)
            if self._drafter:
                self._drafter.select(kept)
            self._rows = [self._rows[place] for place in kept]
            begun = [kept.index(place) for place in begun]
        self._prefill(begun)

    def _prefill(self, places: Sequence[int]) -> None:
        """Brings all of some rows' contexts but the last token into their emptied caches."""
        for place in places:
            self._decoder.cache.truncate(place, 0)
            if self._drafter:
                self._drafter.reset(place)
        rows = [(place, row) for place in places if (row := self._rows[place]) is not None and len(row.context) > 1]
        begun, contexts = [place for place, _ in rows], [row.context[:-1] for _, row in rows]
        if rows and self._drafter:
            hidden, span = self._decoder.extend(begun, contexts)
            for place, states in zip(begun, span.of_rows(hidden), strict=True):
                self._drafter.learn(place, states)
        elif rows:
            self._decoder.fill(begun, contexts)

    def _draft(self, active: Sequence[tuple[int, _Row]]) -> None:
        if self._drafter is None:
            return
        wanted = []
        for place, row in active:
            # No position past the limit, and no draft behind the last token that is wanted.
            most = min(self._drafter.n_drafts, self._limit - len(row.context), row.left - 1)
            wanted.append(DraftRow(place, row.context, most, row.draws))
        for (_, row), draft in zip(active, self._drafter.propose(wanted, self._sampling), strict=True):
            row.drafts = draft

    def _choose(self, logits: Tensor, counts: Sequence[int], rows: Sequence[_Row]) -> list[list[int]]:
        """Each row's new tokens from logits (N, V) of its last token and its drafts."""
        if self._sampling.greedy:
            best = list(logits.argmax(-1).tolist())
            split = [[best.pop(0) for _ in range(count)] for count in counts]
            return [verify_greedy(row.drafts.tokens, of_row) for row, of_row in zip(rows, split, strict=True)]
        targets = distributions(logits, self._sampling).split(list(counts))
        return [
            verify(row.drafts.tokens, stacked(row.drafts.probabilities, logits.shape[1]), target, row.draws)
            for row, target in zip(rows, targets, strict=True)
        ]

    def _advance(self, place: int, row: _Row, states: Tensor, tokens: list[int]) -> Event:
        """Takes a row's new tokens over and forgets what was computed for drafts that were not kept."""
        self.counts.drafted += len(row.drafts.tokens)
        self.counts.accepted += len(tokens) - 1
        if self._drafter:
            self._drafter.learn(place, states[: len(tokens)])
        finished: Literal["", "eod", "length"] = ""
        if self._eod_id in tokens:
            tokens, finished = tokens[: tokens.index(self._eod_id)], "eod"
        row.left -= len(tokens)
        row.context += tokens
        self.counts.tokens += len(tokens)
        if not finished and row.left == 0:
            finished = "length"
        if finished:
            self._rows[place] = None
        else:
            self._decoder.cache.truncate(place, len(row.context) - 1)
        return Event(row.request, tokens, finished)
