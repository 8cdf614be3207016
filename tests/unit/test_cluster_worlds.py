"""Legal world sizes and the seats of ranks on nodes, as arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worlds import divisors, groups_across_nodes, legal_worlds, seat_ranks, world_problems

SHAPE = {"n_routed_experts": 16, "ep_size": 2, "lanes": 8, "global_batch_size": 16, "micro_batch_size": 2}


def test_legal_worlds_and_every_reason():
    worlds = legal_worlds(9, **SHAPE)
    assert worlds.legal == (2, 4, 8)
    assert sorted(worlds.illegal) == [1, 3, 5, 6, 7, 9]
    assert worlds.illegal[1] == ("world size 1 is not a multiple of parallel.ep_size = 2",)
    reasons = " ".join(worlds.illegal[3])
    assert "ep_size" in reasons and "data.lanes = 8" in reasons and "train.global_batch_size = 16" in reasons
    assert [worlds.largest(n) for n in (1, 2, 3, 7, 100)] == [None, 2, 2, 4, 8]


def test_experts_that_cannot_be_split_name_the_sizes_that_can():
    [problem] = world_problems(8, **{**SHAPE, "n_routed_experts": 63, "ep_size": 8})
    assert "model.n_routed_experts = 63" in problem and "[1, 3, 7, 9, 21, 63]" in problem


def test_world_of_nobody_is_refused():
    assert world_problems(0, **SHAPE) == ["world size 0 must be at least 1"]


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 64), st.integers(1, 64), st.integers(1, 4))
def test_a_legal_world_divides_everything(experts, ep_size, lanes, batch, micro):
    worlds = legal_worlds(
        16, n_routed_experts=experts, ep_size=ep_size, lanes=lanes, global_batch_size=batch, micro_batch_size=micro
    )
    assert set(worlds.legal) | set(worlds.illegal) == set(range(1, 17))
    for size in range(1, 17):
        fits = not (experts % ep_size or size % ep_size or lanes % size or batch % (size * micro))
        assert fits == (size in worlds.legal)


def test_divisors():
    assert divisors(63) == [1, 3, 7, 9, 21, 63]


@pytest.mark.parametrize(
    ("nodes", "group", "workers"),
    [
        ("ABAB", 2, [0, 2, 1, 3]),
        ("AAABBB", 2, [0, 1, 3, 4, 2, 5]),
        ("AABB", 4, [0, 1, 2, 3]),
        ("BAAAA", 2, [1, 2, 3, 4, 0]),
        ("AAAAABBBC", 4, [0, 1, 2, 3, 5, 6, 7, 4, 8]),
    ],
)
def test_seats_by_example(nodes, group, workers):
    assert [seat.worker for seat in seat_ranks(nodes, group)] == workers


def test_seats_count_places_on_each_node():
    seats = seat_ranks("ABABA", 2)
    assert [(s.node_rank, s.local_rank, s.local_world_size) for s in seats] == [
        (0, 0, 3),
        (0, 1, 3),
        (1, 0, 2),
        (1, 1, 2),
        (0, 2, 3),
    ]


@settings(max_examples=200)
@given(st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=24), st.integers(1, 8))
def test_seats_are_a_permutation_and_keep_as_many_groups_whole_as_fit(nodes, group):
    seats = seat_ranks(nodes, group)
    assert sorted(seat.worker for seat in seats) == list(range(len(nodes)))
    for node in set(nodes):
        mine = [seat for seat in seats if nodes[seat.worker] == node]
        assert [seat.local_rank for seat in mine] == list(range(len(mine)))
        assert {seat.local_world_size for seat in mine} == {nodes.count(node)}
        assert len({seat.node_rank for seat in mine}) == 1
    whole = sum(nodes.count(node) // group for node in set(nodes))
    groups = -(-len(nodes) // group)
    assert groups_across_nodes(seats, group) <= groups - whole
