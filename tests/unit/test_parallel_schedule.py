"""Learning rates by step."""

import itertools

import pytest

from parallel.config import OptimizerConfig
from parallel.schedule import learning_rate


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
