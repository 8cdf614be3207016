"""The router against literal loops, its statistics, and the bias that stays fp32."""

from dataclasses import replace

import pytest
import torch

from model.bias_histogram import BINS
from model.router import Router, RoutingMemory, choose_experts, count_changed, sequence_balance
from model.routing_stats import Collect, LayerStats
from tests.unit.literal_model import TINY, choose

CASES = {
    "sigmoid, groups, bias": TINY,
    "sigmoid, one group": replace(TINY, n_group=1, topk_group=1),
    "sigmoid, all groups": replace(TINY, n_group=4, topk_group=4),
    "softmax, groups": replace(TINY, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    "softmax, greedy": replace(TINY, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1),
}


def router(config, seed=0, bias=0.2) -> Router:
    torch.manual_seed(seed)
    module = Router(config)
    torch.nn.init.normal_(module.weight, std=0.3)
    module.e_score_correction_bias.normal_(std=bias)
    return module


@pytest.mark.parametrize("case", CASES)
def test_choice_weights_and_statistics_equal_literal_loops(case):
    config = CASES[case]
    module = router(config)
    x = torch.randn(2, 9, config.hidden_size)
    topk_ids, topk_weights, *rest = module(x, RoutingMemory(Collect(True, True)))
    stats = LayerStats(*rest)
    counts, balance, changed = stats[:3]
    bias = module.e_score_correction_bias.tolist() if config.uses_bias else None
    logits = x.reshape(18, -1).double() @ module.weight.double().t()
    scores = (logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)).tolist()
    expected_changed = 0
    expected_counts = torch.zeros(2, config.n_routed_experts)
    for t, token in enumerate(scores):
        chosen = choose(token, bias, config)
        assert set(topk_ids[t].tolist()) == set(chosen)
        total = sum(token[e] for e in chosen) if config.norm_topk_prob else 1.0
        for expert, weight in zip(topk_ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            assert weight == pytest.approx(token[expert] / total * config.routed_scaling_factor, rel=1e-5)
            expected_counts[t // 9, expert] += 1
        expected_changed += len(set(chosen) - set(choose(token, None, config)))
    assert counts.tolist() == expected_counts.sum(0).tolist()
    assert int(changed) == (expected_changed if config.uses_bias else 0)
    expected_balance = 0.0
    for b in range(2):
        for e in range(config.n_routed_experts):
            f = config.n_routed_experts / (config.num_experts_per_tok * 9) * expected_counts[b, e].item()
            expected_balance += f * sum(s[e] / sum(s) for s in scores[b * 9 : b * 9 + 9]) / 9
    assert balance.item() == pytest.approx(expected_balance, rel=1e-5)
    shares = torch.tensor([[one / sum(token) for one in token] for token in scores])
    assert torch.allclose(stats.score_sums, shares.sum(0), rtol=1e-5)
    assert stats.gate_entropy.item() == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)
    pairs = torch.zeros_like(stats.coactivation)
    for chosen in topk_ids.tolist():
        for one in chosen:
            for other in chosen:
                pairs[one, other] += 1
    assert torch.equal(stats.coactivation, pairs)
    assert stats.coactivation.diagonal().tolist() == counts.tolist()
    if config.uses_bias:
        assert stats.bias_histogram.sum(1).tolist() == [18] * config.n_routed_experts
        # whoever needs no further push has chosen the expert already
        assert stats.bias_histogram[:, : BINS // 2].sum(1).tolist() == counts.tolist()


def test_what_nobody_asked_for_is_not_made():
    stats = LayerStats(*router(TINY)(torch.randn(1, 5, TINY.hidden_size))[2:])
    assert stats.bias_histogram.shape == (TINY.n_routed_experts, 0)
    assert stats.coactivation.numel() == 0


def test_a_negative_biased_score_still_beats_a_closed_group():
    scores = torch.full((1, 8), 0.1)
    scores[0, :2] = torch.tensor([0.9, 0.05])
    bias = torch.full((8,), -0.5)
    config = replace(TINY, topk_group=1)
    assert set(choose_experts(scores, bias, config)[0].tolist()) == {0, 1}


def test_bias_steers_the_choice_and_leaves_weights_alone():
    module = router(replace(TINY, n_group=1, topk_group=1), bias=0.0)
    x = torch.randn(1, 5, TINY.hidden_size)
    module.e_score_correction_bias[6] = 10.0
    topk_ids, topk_weights, counts, _, changed, *_ = module(x)
    assert counts[6] == 5
    assert int(changed) <= 5
    scores = (x[0] @ module.weight.t()).sigmoid().gather(1, topk_ids)
    torch.testing.assert_close(topk_weights, scores / scores.sum(-1, keepdim=True) * TINY.routed_scaling_factor)


def test_changed_counts_choices_and_not_tokens():
    config = replace(TINY, n_group=1, topk_group=1)
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert int(count_changed(torch.tensor([[1, 0]]), scores, config)) == 0
    assert int(count_changed(torch.tensor([[0, 5]]), scores, config)) == 1
    assert int(count_changed(torch.tensor([[4, 5]]), scores, config)) == 2


def test_balance_is_one_per_sequence_when_even_and_its_gradient_lowers_the_crowded_expert():
    even = sequence_balance(torch.full((3, 8), 4 / 8), torch.ones(3, 8, dtype=torch.int64), 2, 4)
    assert even.item() == pytest.approx(3.0)
    scores = torch.full((1, 4, 8), 0.5, requires_grad=True)
    counts = torch.tensor([[8, 0, 0, 0, 0, 0, 0, 0]])
    shares = scores / scores.sum(-1, keepdim=True)
    sequence_balance(shares.sum(1), counts, 2, 4).backward()
    assert (scores.grad[0, :, 0] > 0).all()
    assert (scores.grad[0, :, 1:] < 0).all()


def test_gradient_reaches_the_gate_through_weights_and_balance_only():
    module = router(TINY)
    x = torch.randn(1, 6, TINY.hidden_size, requires_grad=True)
    _, weights, _, balance, *_ = module(x)
    for scalar in (weights.square().sum(), balance):
        grad, grad_x = torch.autograd.grad(scalar, (module.weight, x), retain_graph=True)
        assert grad.abs().sum() > 0
        assert grad_x.abs().sum() > 0
    assert not module.e_score_correction_bias.requires_grad


def test_memory_keeps_the_first_choice():
    module = router(TINY)
    x = torch.randn(1, 6, TINY.hidden_size)
    memory = RoutingMemory()
    first = module(x, memory)[0]
    module.e_score_correction_bias.uniform_(-5, 5)
    assert torch.equal(module(x, memory)[0], first)
    assert not torch.equal(module(x, RoutingMemory())[0], first)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_bias_keeps_every_bit_when_the_module_is_cast(cast):
    module = torch.nn.Sequential(router(TINY))  # casts reach it through a parent
    exact = module[0].e_score_correction_bias.clone()
    cast(module)
    assert module[0].weight.dtype != torch.float32
    assert torch.equal(module[0].e_score_correction_bias, exact)
    module.float()
    assert torch.equal(module[0].e_score_correction_bias, exact)


def test_bias_moves_between_devices_and_is_scored_in_fp32_under_bf16():
    assert router(TINY).to("meta").e_score_correction_bias.device.type == "meta"
    module = router(TINY).bfloat16()
    _, weights, _, balance, *_ = module(torch.randn(1, 4, TINY.hidden_size, dtype=torch.bfloat16))
    assert weights.dtype == balance.dtype == torch.float32


def test_autocast_rounds_no_statistic():
    """Sums and counts are products as well, which autocast would make in bfloat16: exact up to 256 and no further."""
    module = router(TINY)
    x = torch.randn(1, 700, TINY.hidden_size)
    x[:, :600] = x[:, :1]  # a pair of experts that more than 256 tokens choose together
    exact = module(x, RoutingMemory(Collect(True, True)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x, RoutingMemory(Collect(True, True)))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert LayerStats(*exact[2:]).coactivation.max() > 256
