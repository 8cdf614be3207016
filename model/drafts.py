"""Who drafts: the model's own multi-token prediction modules, or a second, smaller model."""

# R rows, N tokens of a forward (packed), D hidden, V vocabulary, d depth of a prediction module, from 1

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.block import Block
from model.decoder import CachedStack, Decoder
from model.inference import linear_function, norm_function
from model.mtp import MultiTokenPrediction
from model.sampling import Draws, Sampling, distributions
from model.speculative import draft_token
from model.transformer import Transformer


class Draft(NamedTuple):
    """Tokens drafted for one row, and the distribution (V,) float64 that each was drawn from (none if greedy)."""

    tokens: list[int]
    probabilities: list[Tensor]


class DraftRow(NamedTuple):
    """A row that wants drafts."""

    row: int  # of the cache
    context: Sequence[int]  # all tokens of the row, the last one not yet in the target's cache
    most: int  # drafts wanted at most
    draws: Draws


class Drafter(Protocol):
    """Drafts for rows that it keeps caches of, by the same numbers as the target's."""

    n_drafts: int

    def propose(self, rows: Sequence[DraftRow], sampling: Sampling) -> list[Draft]:
        """For each row up to `most` tokens behind its context."""
        ...

    def learn(self, row: int, hidden: Tensor) -> None:
        """The target has computed the row's next positions: hidden (n, D), of tokens that stay."""
        ...

    def reset(self, row: int) -> None:
        """The row begins anew with an empty context."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on, renumbered in this order."""
        ...


class ModuleDrafts:
    """Drafts as many tokens as the model has prediction modules, module d the d-th.

    Module d at position t joins the states of depth d - 1 there with the embedding of token t + d and predicts token
    t + d + 1. Each module has a cache of its own. With n tokens known, its entries up to position n - 1 - d rest on
    known tokens and stay; later ones rest on drafts and are forgotten after the round.
    """

    def __init__(self, model: Transformer, rows: int) -> None:
        self._model = model
        self._modules = [module for module in model.mtp if isinstance(module, MultiTokenPrediction)]
        self.n_drafts = len(self._modules)
        self._joins = [_Join(module) for module in self._modules]
        blocks = [module.block for module in self._modules]
        self._stacks = [CachedStack([block], model.config, rows) for block in blocks if isinstance(block, Block)]
        # waiting[d - 1][row]: states of depth d - 1 at the positions that module d has not taken in for good
        self._waiting: list[list[Tensor]] = [[self._nothing() for _ in range(rows)] for _ in self._modules]

    def _nothing(self) -> Tensor:
        weight = self._model.embed_tokens.weight
        return weight.new_empty(0, weight.shape[1])

    def learn(self, row: int, hidden: Tensor) -> None:
        self._waiting[0][row] = torch.cat([self._waiting[0][row], hidden])

    def reset(self, row: int) -> None:
        for stack, waiting in zip(self._stacks, self._waiting, strict=True):
            stack.cache.truncate(row, 0)
            waiting[row] = self._nothing()

    def select(self, rows: Sequence[int]) -> None:
        for number, stack in enumerate(self._stacks):
            stack.cache.select(rows)
            self._waiting[number] = [self._waiting[number][row] for row in rows]

    @torch.inference_mode()
    def propose(self, rows: Sequence[DraftRow], sampling: Sampling) -> list[Draft]:
        drafts = [Draft([], []) for _ in rows]
        for depth, (join, stack) in enumerate(zip(self._joins, self._stacks, strict=True), start=1):
            able = [
                i for i, want in enumerate(rows)
                if len(drafts[i].tokens) == depth - 1 < want.most and len(self._waiting[depth - 1][want.row])
            ]  # fmt: skip
            if not able:
                break
            logits = self._deepen(depth, join, stack, [(rows[i], drafts[i]) for i in able])
            _add_tokens(logits, [(rows[i], drafts[i]) for i in able], sampling)
        return drafts

    def _deepen(self, depth: int, join: _Join, stack: CachedStack, rows: Sequence[tuple[DraftRow, Draft]]) -> Tensor:
        """Runs module `depth` over all positions that wait for it; logits (R, V) at each row's last one."""
        waiting = self._waiting[depth - 1]
        before = {want.row: stack.cache.lengths[want.row] for want, _ in rows}
        hidden = torch.cat([waiting[want.row] for want, _ in rows])  # (N, D)
        ahead: list[int] = []
        for want, draft in rows:
            begin = before[want.row] + depth
            ahead += [*want.context, *draft.tokens][begin : begin + len(waiting[want.row])]
        span = stack.span([want.row for want, _ in rows], [len(waiting[want.row]) for want, _ in rows])
        embedded = self._model.embed_tokens(torch.tensor(ahead, device=hidden.device))
        hidden = join.leave(stack.run(join.enter(embedded, hidden), span))
        for (want, _), states in zip(rows, span.of_rows(hidden), strict=True):
            stays = max(0, len(want.context) - depth)
            forgotten = max(0, stack.cache.lengths[want.row] - stays)
            stack.cache.truncate(want.row, stack.cache.lengths[want.row] - forgotten)
            waiting[want.row] = waiting[want.row][len(states) - forgotten :]
            if depth < self.n_drafts:  # states that rested on the last round's drafts are replaced
                deeper, taken = self._waiting[depth], self._stacks[depth].cache.lengths[want.row]
                deeper[want.row] = torch.cat([deeper[want.row][: before[want.row] - taken], states])
        return self._model.lm_head(span.last(hidden))


class _Join:
    """What a prediction module does before and after its block, see model/mtp.py."""

    def __init__(self, module: MultiTokenPrediction) -> None:
        self._embedded, self._hidden = norm_function(module.enorm), norm_function(module.hnorm)
        self._project, self.leave = linear_function(module.eh_proj), norm_function(module.norm)

    def enter(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """(N, D) and (N, D) -> (N, D)."""
        return self._project(torch.cat([self._embedded(embedded), self._hidden(hidden)], dim=-1))


class ModelDrafts:
    """Drafts with a second model of the same vocabulary, one token after the other."""

    def __init__(self, model: Transformer, rows: int, n_drafts: int) -> None:
        self._decoder = Decoder(model, rows)
        self.n_drafts = n_drafts

    def learn(self, row: int, hidden: Tensor) -> None:
        """Nothing: it computes its own states."""

    def reset(self, row: int) -> None:
        self._decoder.cache.truncate(row, 0)

    def select(self, rows: Sequence[int]) -> None:
        self._decoder.cache.select(rows)

    def propose(self, rows: Sequence[DraftRow], sampling: Sampling) -> list[Draft]:
        drafts = [Draft([], []) for _ in rows]
        cache = self._decoder.cache
        for want in rows:  # entries of drafts that were not kept; the last known token is always fed again
            cache.truncate(want.row, min(cache.lengths[want.row], len(want.context) - 1))
        for number in range(self.n_drafts):
            able = [i for i, want in enumerate(rows) if number < want.most]
            if not able:
                break
            new = [
                drafts[i].tokens[-1:] if number else rows[i].context[cache.lengths[rows[i].row] :] for i in able
            ]  # fmt: skip
            hidden, span = self._decoder.extend([rows[i].row for i in able], new)
            logits = self._decoder.logits(span.last(hidden))
            _add_tokens(logits, [(rows[i], drafts[i]) for i in able], sampling)
        return drafts


def _add_tokens(logits: Tensor, rows: Sequence[tuple[DraftRow, Draft]], sampling: Sampling) -> None:
    """One more draft for each row, from logits (R, V)."""
    probabilities = None if sampling.greedy else distributions(logits, sampling)
    for number, (want, draft) in enumerate(rows):
        of_row = None if probabilities is None else probabilities[number]
        draft.tokens.append(draft_token(logits[number], of_row, want.draws))
        if of_row is not None:
            draft.probabilities.append(of_row)
