"""Drafts change the speed and not the text: greedy output is equal, samples are distributed exactly as the target."""

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from model.drafts import DraftRow, ModelDrafts, ModuleDrafts
from model.generate import next_logits
from model.generation import Generation, Request, restart_length
from model.positions import rotary_tables
from model.sampling import Sampling, SeededDraws, distributions
from model.speculative import stacked, verify, verify_greedy
from tests.unit.literal_model import TINY, build

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2] * 13, [8, 8], [1, 2, 3, 4, 5]]


class AllBranches:
    """Stands in for a row's random draws: takes every branch of positive probability once, over many runs.

    `run` is repeated; decisions follow the recorded path and then take first branches. The weight of a run is the
    product of its decisions' probabilities, in float64.
    """

    def __init__(self):
        self.path = []  # [branch taken, number of branches]
        self.at, self.weight = 0, 1.0

    def _branch(self, options):
        """options: (value, probability), all probabilities above 0."""
        if self.at == len(self.path):
            self.path.append([0, len(options)])
        value, probability = options[self.path[self.at][0]]
        self.at += 1
        self.weight *= probability
        return value

    def pick(self, probabilities):
        return self._branch([(token, p) for token, p in enumerate(probabilities.tolist()) if p > 0])

    def happens(self, probability):
        return self._branch([(value, p) for value, p in ((True, probability), (False, 1 - probability)) if p > 0])

    def runs(self, run):
        """Every run's (result, weight)."""
        while True:
            self.at, self.weight = 0, 1.0
            yield run(), self.weight
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


def table(vocab, seed, zeros=False):
    """A next-token distribution for every prefix, float64; with `zeros` some tokens are impossible."""
    made = {}

    def of(prefix):
        if prefix not in made:
            draw = torch.Generator().manual_seed(hash((seed, prefix)) % 2**31)
            weights = torch.rand(vocab, dtype=torch.float64, generator=draw)
            if zeros:
                weights[torch.randint(vocab, (), generator=draw)] = 0.0
            made[prefix] = weights / weights.sum()
        return made[prefix]

    return of


def speculate(target, draft, length, n_drafts, draws):
    """A sequence of `length` tokens: draft, verify, repeat."""
    text = ()
    while len(text) < length:
        drafted, q = [], []
        for _ in range(min(n_drafts, length - len(text) - 1)):
            q.append(draft(text + tuple(drafted)))
            drafted.append(draws.pick(q[-1]))
        p = torch.stack([target(text + tuple(drafted[:i])) for i in range(len(drafted) + 1)])
        text += tuple(verify(drafted, stacked(q, p.shape[1]), p, draws))
    return text


@pytest.mark.parametrize(("vocab", "n_drafts", "zeros"), [(3, 1, False), (2, 3, False), (3, 2, True), (4, 1, True)])
def test_sequences_have_exactly_the_targets_distribution(vocab, n_drafts, zeros):
    length = 3
    target, draft = table(vocab, 1, zeros), table(vocab, 2, zeros)
    found, draws = defaultdict(float), AllBranches()
    for text, weight in draws.runs(lambda: speculate(target, draft, length, n_drafts, draws)):
        found[text] += weight
    for text in itertools.product(range(vocab), repeat=length):
        expected = 1.0
        for place, token in enumerate(text):
            expected *= target(text[:place])[token].item()
        assert abs(found[text] - expected) < 1e-12, text
    assert abs(sum(found.values()) - 1) < 1e-12


def events_of(generation, n):
    made = [[] for _ in range(n)]
    while not generation.done:
        for event in generation.step():
            made[event.request] += event.tokens
    return made


@pytest.mark.parametrize("drafter", ["modules", "model"])
def test_the_whole_generator_has_the_models_distribution(drafter):
    """Caches, prediction modules and ragged rows included: every branch of a real model's generation."""
    config = replace(TINY, vocab_size=3, num_nextn_predict_layers=1)
    net, small = build(config, seed=5).eval(), build(replace(config, num_hidden_layers=1), seed=6).eval()
    make = ModuleDrafts if drafter == "modules" else lambda model, rows: ModelDrafts(small, rows, 1)
    sampling, length, draws, found = Sampling(temperature=1.3), 3, AllBranches(), defaultdict(float)

    def run():
        generation = Generation(
            net, [Request([1, 2], length)], sampling, drafter=lambda rows: make(net, rows), draws=lambda seed: draws
        )
        return tuple(events_of(generation, 1)[0])

    for text, weight in draws.runs(run):
        found[text] += weight
    for text in itertools.product(range(3), repeat=length):
        expected = 1.0
        for place, token in enumerate(text):
            logits = next_logits(net, [1, 2, *text[:place]])
            expected *= distributions(logits, sampling)[token].item()
        assert found[text] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def greedy(model, prompt, count, limit):
    """Without cache, by the rule for contexts that are full."""
    context, made = prompt[-limit:], []
    for _ in range(count):
        made.append(int(next_logits(model, context).argmax()))
        context = [*context, made[-1]]
        context = context[-restart_length(limit) :] if len(context) > limit else context
    return made


@pytest.mark.parametrize(("depths", "limit"), [(1, 64), (3, 9), (1, 1)])
def test_greedy_text_is_that_of_plain_decoding(limit, depths):
    net = build(replace(TINY, num_nextn_predict_layers=depths)).eval()
    small = build(replace(TINY, num_hidden_layers=1, num_nextn_predict_layers=0)).eval()
    expected = [greedy(net, prompt, 9 + number, limit) for number, prompt in enumerate(PROMPTS)]
    requests = [Request(prompt, 9 + number) for number, prompt in enumerate(PROMPTS)]
    drafters = {
        "none": None,
        "modules": lambda rows: ModuleDrafts(net, rows),
        "second model": lambda rows: ModelDrafts(small, rows, 3),
        "itself": lambda rows: ModelDrafts(net, rows, 3),
    }
    for name, drafter in drafters.items():
        for batch in (1, 3):
            generation = Generation(net, requests, Sampling(), max_context=limit, batch=batch, drafter=drafter)
            assert events_of(generation, len(PROMPTS)) == expected, (name, batch)
            counts = generation.counts
            assert counts.tokens == sum(map(len, expected))
            if name == "itself" and limit == 64:
                assert counts.acceptance == 1.0 and counts.steps < counts.tokens / 3


@pytest.mark.parametrize("depths", [1, 3])
def test_modules_draft_from_what_they_predict_in_training(depths):
    """Distributions of drafts, after rounds that kept some drafts and not others, against the losses of the modules."""
    net = build(replace(TINY, num_nextn_predict_layers=depths)).eval()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    modules, sampling = ModuleDrafts(net, 1), Sampling(temperature=1.0)
    with torch.no_grad():
        embedded = net.embed_tokens(torch.tensor(tokens))[None]
        hidden, cos, sin = embedded, *rotary_tables(net.config, len(tokens))
        for layer in net.layers:
            hidden = layer(hidden, cos, sin, None)[0]
        hidden = net.norm(hidden)[0]
    known = learned = 0
    for step in (4, 1, 3, 2, 1, 4):  # tokens that a round makes known
        known += step
        modules.learn(0, hidden[learned : known - 1])
        learned = known - 1
        (draft,) = modules.propose([DraftRow(0, tokens[:known], depths, SeededDraws(0))], sampling)
        text = [*tokens[:known], *draft.tokens]
        targets = torch.tensor([[*text[1:], 0]])
        with torch.no_grad():
            losses = net(torch.tensor([text]), None, targets).mtp_token_losses
        assert len(draft.tokens) == depths
        for depth in range(1, depths + 1):
            drawn = draft.tokens[depth - 1]
            expected = losses[depth - 1][0, known - 2].neg().exp().item()
            assert draft.probabilities[depth - 1][drawn].item() == pytest.approx(expected, rel=1e-4)


def test_verification_keeps_replaces_and_adds():
    sure = torch.eye(3, dtype=torch.float64)
    draws = SeededDraws(0)
    assert verify([0, 1], sure[[0, 1]], sure[[0, 1, 2]], draws) == [0, 1, 2]
    assert verify([0, 1], sure[[0, 1]], sure[[0, 2, 1]], draws) == [0, 2]
    assert verify([], stacked([], 3), sure[[1]], draws) == [1]
    assert verify_greedy([4, 5], [4, 5, 6]) == [4, 5, 6]
    assert verify_greedy([4, 5], [4, 7, 6]) == [4, 7]
    assert verify_greedy([], [9]) == [9]
