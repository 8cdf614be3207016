"""Learning rates by step."""

import itertools

import pytest

from parallel.config import OptimizerConfig
from parallel.schedule import learning_rate, rate_jump


def test_warmup_is_linear_from_the_first_step() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_wsd_is_flat_then_linear() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.0)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:7] == [1.0] * 7
    assert rates[7:] == pytest.approx([0.75, 0.5, 0.25])


def test_cosine_ends_at_its_floor() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 102) for step in range(103)]
    assert rates[2] == 1.0
    assert rates[52] == pytest.approx(0.55)
    assert rates[102] == pytest.approx(0.1)
    assert all(before >= after for before, after in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_rate_jumps_where_the_settings_changed_it_and_nowhere_else(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3, schedule=schedule)  # type: ignore[arg-type]
    for step in range(31):
        assert rate_jump((config, 30), (config, 30), step) is None, step
    longer = rate_jump((config, 30), (config, 60), 30)
    assert (longer is None) == (schedule == "constant")
    if longer is not None:
        assert longer[0] == learning_rate(config, 29, 30) and longer[1] == learning_rate(config, 30, 60) > 2 * longer[0]
    lower = OptimizerConfig(lr=0.5, warmup_steps=3, schedule=schedule)  # type: ignore[arg-type]
    assert rate_jump((config, 30), (lower, 30), 10) == (learning_rate(config, 9, 30), learning_rate(lower, 10, 30))
    assert rate_jump((config, 30), (lower, 30), 0) is None, "there was no step before"
