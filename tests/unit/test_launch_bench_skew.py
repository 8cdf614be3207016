"""From a strongly skewed router: the quantile rule is even within five updates, the sign rule is not."""

import pytest

from launch.bench_skew import WITHIN, Shape, max_vio_by_update, updates_until
from parallel.config import BalanceConfig

SHAPES = (Shape(64, 6, 8192), Shape(64, 6, 8192, n_group=8, topk_group=4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantile_is_even_within_five_updates(shape: Shape) -> None:
    curve = max_vio_by_update(shape, BalanceConfig(rule="quantile", rate=1.0), updates=5)
    assert curve[0] > 8  # the favoured expert has nine times its share
    needed = updates_until(curve, WITHIN * shape.floor)
    assert needed is not None and needed <= 5
    assert curve == max_vio_by_update(shape, BalanceConfig(rule="quantile", rate=1.0), updates=5)


@pytest.mark.parametrize(("rule", "rate"), [("sign", 1e-3), ("sign", 1e-2), ("proportional", 1e-2), ("none", 0.0)])
def test_the_other_rules_are_not(rule: str, rate: float) -> None:
    shape = SHAPES[0]
    curve = max_vio_by_update(shape, BalanceConfig(rule=rule, rate=rate), updates=5)  # type: ignore[arg-type]
    assert updates_until(curve, WITHIN * shape.floor) is None
    assert curve[5] > 5 * shape.floor


def test_updates_until() -> None:
    assert updates_until([3.0, 2.0, 1.0, 0.5], 1.0) == 2
    assert updates_until([3.0], 1.0) is None
