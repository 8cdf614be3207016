"""One model, any layout: losses, gradient norms, counts and biases are those of one process."""

import pytest

from parallel.config import ParallelConfig
from parallel.threads import run_virtual_ranks
from tests.ranks import training
from tests.ranks.spawn import run_ranks

STEPS = 5


@pytest.fixture(scope="module")
def reference() -> dict:
    return training.one_rank(gradients=True)


def assert_same(found: dict, reference: dict, layout: str) -> None:
    """Loss and norm within 1e-5 relative; counts and biases equal, unless the reference had a near-tie at that step."""
    for step in range(STEPS):
        for key, tolerance in (("losses", 1e-5), ("norms", 1e-4)):
            assert found[key][step] == pytest.approx(reference[key][step], rel=tolerance), (
                f"{key} of step {step}, {layout}"
            )
        if found["counts"][step] != reference["counts"][step]:
            assert reference["near_ties"][step], f"step {step}, {layout}: a choice flipped that was not a near-tie"
            return  # from here on the biases may lawfully differ by the flipped tokens
        assert found["biases"][step] == reference["biases"][step], f"biases of step {step}, {layout}"


def test_reference_learns_and_moves_its_bias(reference: dict) -> None:
    assert reference["losses"][-1] < reference["losses"][0] - 0.1
    assert any(value != 0 for layer in reference["biases"][0] for value in layer)
    assert reference["norms"][0] > training.OPTIMIZER.grad_clip, "clipping must be at work, or the norm proves nothing"
    loads = reference["counts"][0][0]
    assert max(loads) > 2 * sum(loads) / len(loads), "routing must be skewed, or the exchange is hardly tried"


@pytest.mark.parametrize(("accumulation", "recompute"), [(2, False), (1, True), (4, True)])
def test_one_process(reference: dict, accumulation: int, recompute: bool) -> None:
    assert_same(
        training.one_rank(accumulation, recompute), reference, f"accumulation {accumulation} recompute {recompute}"
    )


@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_virtual_ranks(reference: dict, world: int, ep_size: int, recompute: bool) -> None:
    accumulation = 2 if recompute else 1
    found = run_virtual_ranks(
        world, lambda group, rank: training.virtual(group, rank, ep_size, accumulation, recompute, gradients=True)
    )
    for rank, result in enumerate(found):
        assert_same(result, reference, f"virtual rank {rank} of {world}, ep {ep_size}, recompute {recompute}")
        for name, gradient in result["gradients"].items():
            assert gradient == pytest.approx(reference["gradients"][name], rel=1e-3, abs=2e-6), name
    names = {name for result in found for name in result["gradients"]}
    assert names == set(reference["gradients"]), "every logical parameter has a gradient on some rank"


WAYS = {
    "a row a choice": {"dispatch": "all_to_all"},
    "chunks": {"chunks": 3},
    "budget": {"rows_budget": 16},
    "two hops": {"dispatch": "two_hop", "ranks_per_node": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_ways_of_dispatch(reference: dict, way: str, recompute: bool) -> None:
    parallel = ParallelConfig(ep_size=4, **WAYS[way])
    found = run_virtual_ranks(
        4, lambda group, rank: training.virtual(group, rank, 4, 1, recompute, gradients=True, parallel=parallel)
    )
    for rank, result in enumerate(found):
        assert_same(result, reference, f"virtual rank {rank} of 4, {way}, recompute {recompute}")
        for name, gradient in result["gradients"].items():
            assert gradient == pytest.approx(reference["gradients"][name], rel=1e-3, abs=2e-6), name


@pytest.mark.slow
def test_ways_of_dispatch_under_zero(reference: dict) -> None:
    cases = [
        [2, stage, 1, recompute, "fp32", STEPS, WAYS[way]]
        for stage in (1, 3)
        for way in WAYS
        if way != "two hops"
        for recompute in (False, True)
    ]
    by_rank = run_ranks(2, "tests.ranks.training:zero_cases", {"cases": cases})
    for rank, results in enumerate(by_rank):
        for case, result in zip(cases, results, strict=True):
            assert_same(result, reference, f"rank {rank} of 2, {case}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_zero(reference: dict, world: int) -> None:
    """All stages in the same processes: starting them takes longer than a stage's cases. Four ranks have accumulation
    and recompute both or neither; one and two ranks have them in all four combinations."""
    cases = [
        [ep_size, stage, accumulation, recompute]
        for stage in (0, 1, 2, 3)
        for ep_size in (1, 2, 4)
        if world % ep_size == 0
        for accumulation in (1, 2)
        for recompute in (False, True)
        if world < 4 or recompute == (accumulation == 2)
    ]
    by_rank = run_ranks(world, "tests.ranks.training:zero_cases", {"cases": cases})
    for rank, results in enumerate(by_rank):
        for case, result in zip(cases, results, strict=True):
            assert not result["compiler_loaded"], "seconds of each rank's start, for what nobody calls"
            assert_same(result, reference, f"rank {rank} of {world}, [ep, stage, accumulation, recompute] = {case}")


@pytest.mark.slow
def test_bf16_follows_fp32_and_keeps_the_bias_exact(reference: dict) -> None:
    """Working weights in bf16 over fp32 masters: losses stay near, the bias still moves in whole steps."""
    cases = [[2, stage, 1, False, "bf16"] for stage in (1, 2, 3)]
    for result in run_ranks(2, "tests.ranks.training:zero_cases", {"cases": cases})[0]:
        assert result["losses"] == pytest.approx(reference["losses"], rel=0.02)
        assert result["dtypes"] == ["torch.float32"]
        steps = [value / training.BALANCE.rate for layer in result["biases"][-1] for value in layer]
        assert steps == pytest.approx([round(step) for step in steps], abs=1e-4)
