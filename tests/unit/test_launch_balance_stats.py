"""The balance figures: counts of one step against literal formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from launch import balance_stats

CONFIG = {"model": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}}
COUNTS = torch.tensor([[10, 0, 6, 8], [6, 6, 6, 6], [24, 0, 0, 0]])  # two MoE layers and one MTP block


@settings(max_examples=60, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 6, 12])), elements=st.integers(0, 50)))
def test_max_vio_is_the_literal_formula(counts: np.ndarray) -> None:
    for ep_size in (1, 2):
        if counts.shape[1] % ep_size:
            continue
        expert_figures, rank_figures = [], []
        for layer in counts.tolist():
            if sum(layer) == 0:
                continue
            share = len(layer) // ep_size
            ranks = [sum(layer[r * share : (r + 1) * share]) for r in range(ep_size)]
            expert_figures.append((max(layer) - sum(layer) / len(layer)) / (sum(layer) / len(layer)))
            rank_figures.append((max(ranks) - sum(ranks) / ep_size) / (sum(ranks) / ep_size))
        got = balance_stats.max_vio(torch.from_numpy(counts)), balance_stats.max_vio_rank(counts, ep_size)
        if expert_figures:
            assert got[0] == pytest.approx(sum(expert_figures) / len(expert_figures))
            assert got[1] == pytest.approx(sum(rank_figures) / len(rank_figures), abs=1e-12)
        else:
            assert math.isnan(got[0]) and math.isnan(got[1])


def test_balance_figures_by_hand() -> None:
    assert balance_stats.max_vio_per_layer(COUNTS).tolist() == pytest.approx([4 / 6, 0.0, 3.0])
    assert balance_stats.rank_loads(COUNTS, 2).tolist() == [[10, 14], [12, 12], [24, 0]]
    assert balance_stats.max_vio_rank_per_layer(COUNTS, 2).tolist() == pytest.approx([2 / 12, 0.0, 1.0])
    assert balance_stats.max_vio_rank(COUNTS, 1) == 0.0
    assert balance_stats.dead_experts(COUNTS).sum(axis=1).tolist() == [1, 0, 3]
    assert balance_stats.dead_experts(np.array([[0, 1, 2]])).tolist() == [[True, False, False]]
    assert balance_stats.load_ratio(COUNTS)[2].tolist() == [4.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="4 experts cannot be split over ep_size = 3"):
        balance_stats.rank_loads(COUNTS, 3)
    with pytest.raises(ValueError, match=r"\(n_layers, n_experts\)"):
        balance_stats.max_vio(COUNTS[0])


def test_counts_beyond_what_floats_of_32_bits_hold_stay_exact() -> None:
    counts = torch.tensor([[2**30 + 1, 2**30 - 1]])
    assert balance_stats.rank_loads(counts, 2).tolist() == [[2**30 + 1, 2**30 - 1]]
    assert balance_stats.max_vio(counts) == pytest.approx(2.0**-30, rel=1e-9)


def test_the_noise_floor_is_the_formula_and_what_a_fair_choice_shows() -> None:
    assert balance_stats.noise_floor(64, 6 * 8192) == pytest.approx(math.sqrt(2 * math.log(64) * 64 / (6 * 8192)))
    fair = np.random.default_rng(0).multinomial(6 * 8192, [1 / 64] * 64, size=200)
    assert balance_stats.max_vio(fair) == pytest.approx(balance_stats.max_vio_floor(fair), rel=0.2)
    assert math.isnan(balance_stats.noise_floor(64, 0))


def test_each_layer_has_the_floor_of_its_own_counts() -> None:
    counts = np.array([[10, 0, 6, 8], [1, 1, 1, 1], [0, 0, 0, 0]])
    floors = balance_stats.max_vio_floor_per_layer(counts)
    assert floors[:2].tolist() == [balance_stats.noise_floor(4, 24), balance_stats.noise_floor(4, 4)]
    assert math.isnan(floors[2])
    assert balance_stats.max_vio_floor(counts) == balance_stats.mean_of_known(floors) == floors[:2].mean()


def test_lift_is_one_for_choices_that_know_nothing_of_each_other() -> None:
    load = np.array([40.0, 20.0, 20.0, 10.0])
    pairs = np.outer(load, load) * 3
    np.fill_diagonal(pairs, load)
    lift = balance_stats.coactivation_lift(pairs)
    assert lift[~np.eye(4, dtype=bool)] == pytest.approx(1.0)
    assert np.isnan(np.diagonal(lift)).all()


def test_lift_by_hand() -> None:
    # experts 0 and 1 always together, 2 and 3 always together, 4 never chosen; 10 tokens each, top-2
    pairs = np.zeros((1, 5, 5), dtype=np.int64)
    for i, j in ((0, 1), (2, 3)):
        pairs[0, [i, i, j, j], [i, j, i, j]] = 10
    lift = balance_stats.coactivation_lift(torch.from_numpy(pairs))[0]
    assert lift[0, 1] == lift[3, 2] == pytest.approx(3.0)  # 10 pairs, where 6 equal kinds of pair share 20
    assert lift[0, 2] == lift[1, 3] == 0.0
    assert np.isnan(lift[4]).all() and np.isnan(lift[:, 4]).all()


def test_one_expert_a_token_has_no_pairs() -> None:
    assert np.isnan(balance_stats.coactivation_lift(np.diag([3, 4, 5]))).all()


def test_layers_are_named_as_the_model_numbers_them() -> None:
    assert balance_stats.layer_names(CONFIG, 3) == ["layer 1", "layer 2", "mtp 0"]
    assert balance_stats.layer_names(CONFIG, 2) == ["moe 0", "moe 1"]
    assert balance_stats.layer_names({}, 1) == ["moe 0"]
