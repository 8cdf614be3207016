"""The rules of the routing bias against their papers, literal loops, and what they promise."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bias_histogram import BINS, REACH, bias_needed, bin_edges, histogram
from model.config import ModelConfig
from model.router import choose_experts
from parallel.balance_rules import proportional_rule, quantile_rule, recentred, sign_rule

ROUTER = ModelConfig(n_routed_experts=16, num_experts_per_tok=3, n_group=1, topk_group=1)
GROUPED = replace(ROUTER, n_group=4, topk_group=2)


def test_sign_rule_against_the_paper() -> None:
    counts = torch.tensor([[10, 20, 30], [7, 7, 7]])
    moved = sign_rule(counts, torch.zeros(2, 3), 0.001)
    assert torch.equal(moved, torch.tensor([[0.001, 0.0, -0.001], [0.0, 0.0, 0.0]]))


def test_one_token_decides_among_millions() -> None:
    """A mean in bf16, or counts in bf16, would see no difference here, or one of the wrong sign."""
    counts = torch.tensor([100_000_001, 100_000_000, 99_999_999, 100_000_000])
    moved = sign_rule(counts, torch.zeros(4), 1.0)
    assert moved.tolist() == [-1.0, 0.0, 1.0, 0.0]
    rounded = counts.to(torch.bfloat16).to(torch.int64)
    assert sign_rule(rounded, torch.zeros(4), 1.0).tolist() != moved.tolist()


def test_the_mean_need_not_be_an_integer() -> None:
    assert sign_rule(torch.tensor([1, 1, 2]), torch.zeros(3), 1.0).tolist() == [1.0, 1.0, -1.0]


def test_proportional_rule_moves_by_the_relative_shortfall() -> None:
    counts = torch.tensor([[0, 10, 20, 10], [0, 0, 0, 0]])
    assert proportional_rule(counts, torch.ones(2, 4), 0.5).tolist() == [[1.5, 1.0, 0.5, 1.0], [1.0] * 4]
    assert torch.equal(
        proportional_rule(counts * 1000, torch.zeros(2, 4), 0.5), proportional_rule(counts, torch.zeros(2, 4), 0.5)
    )


def test_edges_are_finest_at_zero() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,)
    assert (edges.diff() > 0).all()
    assert (edges[0], edges[BINS // 2], edges[-1]) == (-REACH, 0.0, REACH)
    assert edges[BINS // 2 + 1] < 1e-6


@given(st.integers(0, 2**32), st.sampled_from([ROUTER, GROUPED]))
@settings(max_examples=40, deadline=None)
def test_a_need_is_what_decides_a_choice(seed: int, config: ModelConfig) -> None:
    """Negative needs are the choices; twice the need, from the middle of the gap across it, turns the choice round."""
    generator = torch.Generator().manual_seed(seed)
    biased = torch.rand(6, 16, generator=generator)
    needs = bias_needed(biased, config)
    chosen = torch.zeros(6, 16, dtype=torch.bool).scatter_(1, choose_experts(biased, None, config), True)
    assert torch.equal(needs < 0, chosen)
    for expert in range(0, 16, 5) if config is ROUTER else ():  # a group's other experts would move with it
        pushed = biased.clone()
        pushed[:, expert] += 2 * needs[:, expert] + needs[:, expert].sign() * 1e-6
        assert torch.equal((choose_experts(pushed, None, config) == expert).any(1), ~chosen[:, expert])


def test_the_histogram_counts_every_token_once_in_its_bin() -> None:
    needs = torch.tensor([[-5.0, 0.3], [-1e-9, 5.0], [0.3, -0.3]])
    counts = histogram(needs)
    edges = bin_edges()
    for expert in range(2):
        for token in range(3):
            value = float(needs[token, expert].clamp(-REACH, REACH * (1 - 1e-7)))
            place = int(torch.searchsorted(edges, value, right=True)) - 1
            assert counts[expert, place] > 0
    assert counts.sum(1).tolist() == [3, 3]


def test_quantile_rule_finds_the_exact_share_of_fixed_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    needs = torch.randn(20_000, 8, generator=generator) * 0.05 + torch.linspace(-0.2, 0.4, 8)
    counts = torch.tensor([[20_000 * 2 // 8] * 8])
    moved = quantile_rule(histogram(needs).unsqueeze(0), counts, torch.zeros(1, 8), 1.0)[0]
    reached = (needs < moved).sum(0)
    assert (reached - 5000).abs().max() < 60, "within a hundredth of the share: bins are finer than that"
    exact = needs.double().quantile(0.25, dim=0)
    assert torch.allclose(moved.double(), exact, atol=2e-3)
    half = quantile_rule(histogram(needs).unsqueeze(0), counts, torch.zeros(1, 8), 0.5)[0]
    assert torch.allclose(half, moved / 2, atol=1e-7)


def test_quantile_rule_leaves_a_layer_without_tokens() -> None:
    bias = torch.tensor([[0.1, -0.2]])
    empty = torch.zeros(1, 2, BINS, dtype=torch.int64)
    assert torch.equal(quantile_rule(empty, torch.zeros(1, 2, dtype=torch.int64), bias, 1.0), bias)


def test_histograms_of_parts_add_up_to_the_same_bias_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    biased = torch.rand(512, 16, generator=generator)
    needs = bias_needed(biased, GROUPED)
    counts = torch.tensor([[512 * 3 // 16] * 16])
    whole = quantile_rule(histogram(needs).unsqueeze(0), counts, torch.zeros(1, 16), 1.0)
    parts = sum(histogram(bias_needed(part, GROUPED)) for part in biased.split([100, 1, 411]))
    assert torch.equal(quantile_rule(parts.unsqueeze(0), counts, torch.zeros(1, 16), 1.0), whole)


def max_vio_by_update(rule: str, rate: float, config: ModelConfig, updates: int, tokens: int = 4096) -> list[float]:
    """max_vio over the noise floor before each update, of a router that favours expert 0 by four logits."""
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(1)
    favour = torch.randn(experts, generator=generator) * 0.3
    favour[0] += 4.0
    bias, figures = torch.zeros(experts), []
    floor = math.sqrt(2 * math.log(experts) * experts / (tokens * top_k))
    for _ in range(updates + 1):
        scores = (torch.randn(tokens, experts, generator=generator) + favour).sigmoid()
        counts = choose_experts(scores, bias, config).flatten().bincount(minlength=experts)
        figures.append(float(counts.max() / counts.float().mean() - 1) / floor)
        if rule == "quantile":
            needs = histogram(bias_needed(scores + bias, config))
            bias = quantile_rule(needs.unsqueeze(0), counts.unsqueeze(0), bias.unsqueeze(0), rate)[0]
        else:
            bias = sign_rule(counts, bias, rate)
    return figures


@pytest.mark.parametrize("config", [ROUTER, GROUPED])
def test_quantile_needs_five_updates_from_a_skewed_router_and_sign_hundreds(config: ModelConfig) -> None:
    quantile = max_vio_by_update("quantile", 1.0, config, 5)
    assert quantile[0] > 20
    assert min(quantile[1:]) <= 1.3
    assert quantile[5] <= 1.3
    assert max_vio_by_update("sign", 1e-3, config, 5)[5] > 20


def test_recentring_changes_no_choice() -> None:
    generator = torch.Generator().manual_seed(5)
    scores, bias = torch.rand(64, 16, generator=generator), torch.rand(16, generator=generator)
    centred = recentred(bias)
    assert float(centred.mean()) == pytest.approx(0, abs=1e-7)
    for config in (ROUTER, GROUPED):
        assert torch.equal(choose_experts(scores, bias, config), choose_experts(scores, centred, config))
