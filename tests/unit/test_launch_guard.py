"""The guard: what is not finite is skipped, and does not go on for ever."""

import math

import pytest

from launch.guard import Guard, TrainingDivergedError


def test_finite_steps_are_kept() -> None:
    assert Guard().judge(0, 2.0, 1e6).keep


@pytest.mark.parametrize(("loss", "norm", "reason"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "norm is inf")])
def test_others_are_skipped_with_the_reason(loss: float, norm: float, reason: str) -> None:
    verdict = Guard().judge(0, loss, norm)
    assert not verdict.keep
    assert reason in verdict.reason


def test_a_row_of_skips_ends_the_run_and_a_good_step_resets_it() -> None:
    guard = Guard(patience=3)
    for step in range(2):
        guard.judge(step, math.nan, 1.0)
    assert guard.judge(2, 1.0, 1.0).keep
    for step in range(2):
        assert not guard.judge(step, math.nan, 1.0).keep
    with pytest.raises(TrainingDivergedError, match="3th step in a row"):
        guard.judge(5, math.nan, 1.0)
