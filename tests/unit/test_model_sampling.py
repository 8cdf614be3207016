"""Temperature, top-k and top-p against their definitions; draws follow the distribution and the row's seed alone."""

import pytest
import torch

from model.generation import Generation, Request
from model.sampling import Sampling, SeededDraws, distributions
from tests.unit.literal_model import TINY, build


def by_definition(logits, temperature, top_k, top_p):
    """Slow and literal, in Python floats."""
    scaled = [value / temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))[: top_k or None]
    weights = [2.718281828459045 ** (scaled[token] - scaled[order[0]]) for token in order]
    shares = [weight / sum(weights) for weight in weights]
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if total >= top_p and kept:
            break
        kept.append((token, share))
        total += share
    made = [0.0] * len(logits)
    for token, share in kept:
        made[token] = share / total
    return made


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-9])
def test_distributions_follow_the_definition(temperature, top_k, top_p):
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(1)) * 2
    logits[1, 3:7] = logits[1].max()  # equals stay in the order of token numbers
    found = distributions(logits, Sampling(temperature, top_k, top_p))
    assert found.dtype == torch.float64
    for row, of_row in zip(logits.double().tolist(), found.tolist(), strict=True):
        assert of_row == pytest.approx(by_definition(row, temperature, top_k, top_p), abs=1e-9)


def test_greedy_and_tiny_temperatures():
    logits = torch.tensor([[1.0, 3.0, 3.0], [100.0, -100.0, 99.0]])
    assert distributions(logits, Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert distributions(logits, Sampling(1e-300))[1].tolist() == [1, 0, 0]


def test_draws_follow_the_distribution_and_never_give_the_impossible():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    draws, n = SeededDraws(3), 4000
    counts = torch.bincount(torch.tensor([draws.pick(probabilities) for _ in range(n)]), minlength=6)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept] * n
    chi_squared = ((counts[kept] - expected).square() / expected).sum()
    assert chi_squared < 13.8  # 2 degrees of freedom: above it once in a thousand
    assert sum(draws.happens(0.3) for _ in range(n)) == pytest.approx(0.3 * n, abs=4 * (0.21 * n) ** 0.5)
    assert draws.happens(1.0) and not draws.happens(0.0)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.2, 3), (0.7, 4), (1 - 2**-53, 4)])
def test_numbers_on_a_border_draw_a_possible_token(number, token):
    draws = SeededDraws(0)
    draws._uniform = lambda: number
    assert draws.pick(torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)) == token


def texts(net, requests, batch, **settings):
    generation = Generation(net, requests, Sampling(1.0, **settings), batch=batch)
    made = [[] for _ in requests]
    while not generation.done:
        for event in generation.step():
            made[event.request] += event.tokens
    return made


def test_a_rows_draws_do_not_depend_on_its_batch():
    net = build().eval()
    requests = [Request([3, 1, number], 5 + 3 * number, seed=7 + number) for number in range(5)]
    alone = [texts(net, [request], 1)[0] for request in requests]
    assert [len(text) for text in alone] == [5, 8, 11, 14, 17]
    for batch in (1, 2, 3, 8):
        assert texts(net, requests, batch) == alone
    assert texts(net, requests[::-1], 3) == alone[::-1]
    same = [Request([3, 1, 4], 12, seed) for seed in (1, 1, 2)]
    first, second, third = texts(net, same, 3)
    assert first == second != third


def test_rows_end_cancel_and_refuse():
    net = build().eval()
    requests = [Request([1, 2], 6), Request([3], 0), Request([4], 6)]
    plain = texts(net, [requests[0]], 1)[0]
    generation = Generation(net, requests, Sampling(1.0), eod_id=plain[2], batch=1)
    events = []
    while not generation.done:
        events += generation.step()
        if generation.counts.steps == 5:
            generation.cancel(2)
    first = [event for event in events if event.request == 0]
    assert [token for event in first for token in event.tokens] == plain[: plain.index(plain[2])]
    assert [event.finished for event in first] == [*[""] * (len(first) - 1), "eod"]
    assert not any(event.request == 1 for event in events)
    assert sum(len(event.tokens) for event in events if event.request == 2) < 6
    with pytest.raises(ValueError, match=r"(?s)temperature = -1.*top_k = -2.*top_p = 0.*request 1: prompt token 50"):
        Generation(net, [Request([1], 1), Request([TINY.vocab_size], 1)], Sampling(-1.0, -2, 0.0))
    with pytest.raises(ValueError, match="batch = 0"):
        Generation(net, [], Sampling(), batch=0)
