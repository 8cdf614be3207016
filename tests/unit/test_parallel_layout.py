"""Layouts of ranks: groups partition the world, experts are held once per group."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout, divisors, slice_bounds

worlds = st.integers(1, 64).flatmap(lambda world: st.tuples(st.just(world), st.sampled_from(divisors(world))))


def test_the_layout_of_the_docstring() -> None:
    layout = Layout(8, 4, 6)
    assert layout.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.edp_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert (layout.ep_rank, layout.edp_rank, layout.edp_size) == (2, 1, 2)
    assert layout.inside_groups() == layout.node_groups() == []
    on_nodes = Layout(8, 4, 6, ranks_per_node=2)
    assert on_nodes.inside_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert on_nodes.node_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(("per_node", "ep_size", "spans"), [(2, 4, True), (4, 4, False), (8, 4, False), (0, 4, False)])
def test_an_ep_group_spans_nodes_where_they_are_smaller(per_node: int, ep_size: int, spans: bool) -> None:
    layout = Layout(8, ep_size, 0, per_node)
    assert layout.spans_nodes == bool(layout.node_groups()) == bool(layout.inside_groups()) == spans


def test_nodes_that_cut_an_ep_group_unevenly_are_refused() -> None:
    with pytest.raises(ValueError, match="nodes of 3 ranks cut expert-parallel groups of 4 into unequal parts"):
        Layout(12, 4, 0, ranks_per_node=3)


@given(worlds)
def test_groups_partition_the_world(world: tuple[int, int]) -> None:
    world_size, ep_size = world
    for groups in (Layout(world_size, ep_size, 0).ep_groups(), Layout(world_size, ep_size, 0).edp_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
    for rank in range(world_size):
        layout = Layout(world_size, ep_size, rank)
        assert layout.ep_groups()[layout.edp_rank][layout.ep_rank] == rank
        assert layout.edp_groups()[layout.ep_rank][layout.edp_rank] == rank


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_slices_cover_everything_once(numel: int, parts: int) -> None:
    bounds = [slice_bounds(numel, parts, part) for part in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert max(stop - start for start, stop in bounds) - min(stop - start for start, stop in bounds) <= 1


def test_an_ep_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"6 ranks cannot be cut .* of 4; use an ep_size among \[1, 2, 3, 6\]"):
        Layout(6, 4, 0)
