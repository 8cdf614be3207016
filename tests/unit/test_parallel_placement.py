"""Placements: always every expert once, never a busier rank, nearly the best there is; nobody moves for nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import balance_stats
from parallel.placement import balanced, identity, moved, rank_loads, validate


@st.composite
def cases(draw, sizes=((1, 1), (2, 2), (4, 2), (6, 3), (8, 2), (8, 4), (12, 4), (16, 16))):
    """(counts (M, E), ep_size, current (M, E)): even, skewed, many ties, a layer without a token."""
    experts, ep_size = draw(st.sampled_from(sizes))
    layers = draw(st.integers(1, 3))
    load = st.one_of(st.integers(0, 3), st.integers(0, 2000), st.just(2**40))
    counts = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    current = [draw(st.permutations(range(experts))) for _ in range(layers)]
    return np.array(counts, dtype=np.int64), ep_size, np.array(current, dtype=np.int64)


def busiest(counts, table, ep_size) -> list[int]:
    return rank_loads(counts, table, ep_size).max(axis=1).tolist()


@given(cases(), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=150, deadline=None)
def test_every_expert_once_and_no_rank_busier(case, min_gain) -> None:
    counts, ep_size, current = case
    before = current.copy()
    table = balanced(counts, ep_size, current, min_gain)
    assert np.array_equal(current, before), "the argument is not changed"
    assert np.array_equal(validate(table, *counts.shape), table)
    assert np.array_equal(balanced(counts, ep_size, current, min_gain), table), "the same on every rank"
    for row, now, then in zip(
        range(len(counts)), busiest(counts, current, ep_size), busiest(counts, table, ep_size), strict=True
    ):
        gain = (now - then) * ep_size
        same = np.array_equal(table[row], current[row])
        assert same or (gain > 0 and gain >= min_gain * counts[row].sum())


@given(cases())
@settings(max_examples=100, deadline=None)
def test_who_stays_on_a_rank_stays_in_the_slot(case) -> None:
    counts, ep_size, current = case
    table = balanced(counts, ep_size, current)
    went = moved(current, table, ep_size)
    for row in range(len(counts)):
        stayed = np.flatnonzero(~went[row])
        assert np.array_equal(np.argsort(table[row])[stayed], np.argsort(current[row])[stayed])
        n_local = counts.shape[1] // ep_size
        homes = [set(current[row][g * n_local :][:n_local].tolist()) for g in range(ep_size)]
        literal = [e for g in range(ep_size) for e in table[row][g * n_local :][:n_local].tolist() if e not in homes[g]]
        assert sorted(literal) == np.flatnonzero(went[row]).tolist()


@given(cases(sizes=((6, 2), (6, 3), (8, 2), (8, 4))))
@settings(max_examples=60, deadline=None)
def test_close_to_the_best_of_all_tables(case) -> None:
    counts, ep_size, current = case
    table = balanced(counts, ep_size, current)
    for row, found in zip(counts, busiest(counts, table, ep_size), strict=True):
        best = optimum(row.tolist(), ep_size)
        assert best <= found <= best * 1.1 + 1  # 1.033 was the worst of 4200 random cases, and most were the optimum


def optimum(loads: list[int], ep_size: int) -> int:
    """The lowest load that the busiest rank can have, by trying every way to deal the experts out."""
    n_local = len(loads) // ep_size

    def best(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        first, others = left[0], left[1:]
        found = []
        for friends in itertools.combinations(others, n_local - 1):
            rest = best(tuple(expert for expert in others if expert not in friends))
            found.append(max(rest, loads[first] + sum(loads[expert] for expert in friends)))
        return min(found)

    return best(tuple(range(len(loads))))


def test_by_hand() -> None:
    counts = np.array([[9, 8, 1, 1], [5, 5, 5, 5], [0, 0, 0, 0], [10, 1, 9, 0]])
    table = balanced(counts, 2, identity(4, 4))
    assert busiest(counts, table, 2) == [10, 10, 0, 10]
    assert table[1:3].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]], "nothing to gain: nobody moves"
    assert moved(identity(4, 4), table, 2).sum(axis=1).tolist() == [2, 0, 0, 2], "one swap is enough"
    assert balanced(counts, 2, identity(4, 4), min_gain=0.2)[3].tolist() == [0, 1, 2, 3], "1 of 10 is too little"


def test_swaps_find_what_dealing_out_alone_does_not() -> None:
    counts = np.array([[0, 7, 0, 6, 0, 4, 5, 4]])  # heaviest first to the least loaded: 15 and 11
    assert busiest(counts, balanced(counts, 2, identity(1, 8)), 2) == [13]
    generator = np.random.default_rng(0)
    many = generator.multinomial(10**6, generator.dirichlet(np.full(64, 3.0)), size=4)
    table = balanced(many, 8, identity(4, 64), min_gain=0.05)
    assert (rank_loads(many, table, 8).max(axis=1) < 1.01 * 10**6 / 8).all()
    assert moved(identity(4, 64), table, 8).mean() < 0.5, "dealt out from nothing, two thirds would move"


def test_rank_loads_go_by_slot_and_agree_with_the_reported_figure() -> None:
    counts = np.array([[1, 10, 100, 1000]])
    table = np.array([[2, 0, 3, 1]])
    assert rank_loads(counts, table, 2).tolist() == [[101, 1010]]
    assert balance_stats.rank_loads(counts, 2, table).tolist() == [[101, 1010]]
    assert balance_stats.max_vio_rank(counts, 2, table) == pytest.approx((1010 - 555.5) / 555.5)
    assert balance_stats.max_vio_rank(counts, 4, table) == balance_stats.max_vio(counts)
    with pytest.raises(ValueError, match=r"the placement has the shape \(1, 2\), tokens_per_expert \(1, 4\)"):
        balance_stats.rank_loads(counts, 2, np.array([[1, 0]]))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([[0, 1, 1, 3]], "row 0 does not hold every expert once"),
        ([[0, 1]], r"shape \(1, 2\) does not fit 1 MoE layers"),
    ],
)
def test_a_table_that_is_none_is_refused(table, says) -> None:
    with pytest.raises(ValueError, match=says):
        validate(table, 1, 4)
