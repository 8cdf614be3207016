"""The guard: what is not finite or stands out is skipped, not for ever; slow changes are told; a resumed one agrees."""

import json
import math

import pytest

from launch.drift import Drift, Drop
from launch.guard import Guard, Verdict, ordinal
from launch.guard_config import GuardConfig
from launch.spikes import Window, robust

SPIKES = GuardConfig(spike_window=32, drift_window=0)


def wave(step: int) -> float:
    """An ordinary figure that goes up and down by a tenth."""
    return 2.0 + 0.1 * math.sin(step)


def settled(config: GuardConfig = SPIKES, steps: int = 40) -> Guard:
    """A guard that has seen ordinary steps."""
    guard = Guard(config)
    for step in range(steps):
        assert guard.judge(step, wave(step), wave(step)).keep
    return guard


def test_finite_steps_are_kept_while_there_is_nothing_to_compare_with() -> None:
    assert Guard().judge(0, 2.0, 1e6) == Verdict(True)


@pytest.mark.parametrize(("loss", "norm", "reason"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "norm is inf")])
def test_others_are_skipped_with_the_reason(loss: float, norm: float, reason: str) -> None:
    verdict = Guard().judge(0, loss, norm)
    assert (verdict.keep, verdict.kind, verdict.then) == (False, "non_finite", "go on")
    assert reason in verdict.reason


def test_a_row_of_skips_ends_the_run_and_a_good_step_resets_it() -> None:
    guard = Guard(GuardConfig(max_skips=3))
    for step in range(2):
        guard.judge(step, math.nan, 1.0)
    assert guard.judge(2, 1.0, 1.0).keep
    for step in range(3, 5):
        assert guard.judge(step, math.nan, 1.0).then == "go on"
    verdict = guard.judge(5, math.nan, 1.0)
    assert (verdict.then, verdict.first) == ("stop", 3)
    assert "step 6: loss is nan, for the 3rd step in a row; go back" in str(guard.lost(5, verdict))


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [(5.0, 2.0, r"loss 5 is above 3\."), (2.0, 20.0, r"gradient norm 20 is above 8"), (9.0, 90.0, " and ")],
)
def test_spikes_are_skipped(loss: float, norm: float, reason: str) -> None:
    import re

    guard = settled()
    verdict = guard.judge(40, loss, norm)
    assert (verdict.keep, verdict.kind, verdict.first) == (False, "spike", 40)
    assert re.search(reason, verdict.reason), verdict.reason
    assert guard.judge(41, wave(41), wave(41)).keep


@pytest.mark.parametrize(("loss", "norm"), [(2.4, 2.0), (2.0, 7.0), (0.5, 0.1)])
def test_what_a_healthy_run_may_do_is_not_a_spike(loss: float, norm: float) -> None:
    assert settled().judge(40, loss, norm).keep


def test_spikes_are_not_looked_for_without_a_window() -> None:
    assert settled(GuardConfig(spike_window=0)).judge(40, 1e9, 1e9).keep


def test_a_level_that_stays_is_taken_as_real() -> None:
    guard = settled()
    kept = [guard.judge(40 + n, 6.0, 2.0) for n in range(5)]
    assert [verdict.keep for verdict in kept] == [False, False, False, True, True]
    assert "after 3 skipped steps: taken as the new level" in kept[3].reason
    assert kept[4] == Verdict(True)


def test_skipped_steps_do_not_move_the_bounds() -> None:
    guard = settled()
    for step in range(40, 80):
        verdict = guard.judge(step, 6.0 if step % 2 else wave(step), 2.0)
        assert verdict.keep == (step % 2 == 0), step


@pytest.mark.parametrize(("loss", "count", "kind"), [(math.nan, 10, "non_finite"), (50.0, 3, "spike")])
def test_going_back_instead_of_stopping_or_giving_in(loss: float, count: int, kind: str) -> None:
    guard = settled(GuardConfig(spike_window=32, rollback_steps=5, max_rollbacks=1))
    for again in ("go back", "stop"):
        row = [guard.judge(40 + n, loss, 2.0) for n in range(count)]
        assert [verdict.then for verdict in row] == ["go on"] * (count - 1) + [again]
        assert (row[-1].first, row[-1].kind) == (40, kind)
        guard.went_back()


def test_a_resumed_guard_judges_alike() -> None:
    config = GuardConfig(spike_window=16, drift_window=4, max_skips=4, rollback_steps=1)
    figures = [(wave(n) + 0.02 * n, wave(n)) for n in range(60)]
    figures[30:33] = [(math.nan, 1.0)] * 3
    figures[40] = (30.0, 1.0)
    for cut in (5, 31, 32, 33, 41, 50):
        whole, before = Guard(config), Guard(config)
        for step in range(cut):
            assert whole.judge(step, *figures[step]) == before.judge(step, *figures[step])
        whole.judge_weights(cut, {"output layer": 1.0})
        before.judge_weights(cut, {"output layer": 1.0})
        after = Guard(config)
        after.load_state(json.loads(json.dumps(before.state())))
        assert after.state() == whole.state()
        rest = [(step, *figures[step]) for step in range(cut, 60)]
        assert [after.judge(*one) for one in rest] == [whole.judge(*one) for one in rest]
        assert after.judge_weights(60, {"output layer": 99.0}) == whole.judge_weights(60, {"output layer": 99.0})


def test_an_older_checkpoint_without_a_guard_starts_afresh() -> None:
    guard = settled()
    guard.load_state({})
    assert guard.state() == Guard(SPIKES).state()


def test_a_creeping_loss_is_an_alarm_that_ends() -> None:
    guard = Guard(GuardConfig(spike_window=0, drift_window=10))
    losses = [3.0 - 0.01 * n for n in range(60)] + [2.4 + 0.005 * n for n in range(60)] + [2.0] * 30
    alarms = [alarm for n, loss in enumerate(losses) for alarm in guard.judge(n, loss, 1.0).alarms]
    assert [(alarm.kind, alarm.ended) for alarm in alarms] == [("loss_drift", False), ("loss_drift", True)]
    assert 80 < alarms[0].step <= 110 and alarms[0].since == alarms[0].step - 30
    assert "creeps up" in alarms[0].cause and alarms[0].value > 1.02


def test_a_loss_that_falls_or_wavers_is_no_drift() -> None:
    for loss in (lambda n: 3.0 / (1 + n), wave):
        drift = Drift(40, 0.02)
        assert [drift.add(loss(n)) for n in range(1000)] == [None] * 1000


def test_a_sudden_drop_that_lasts_is_told() -> None:
    guard = settled()
    alarms = [alarm for n in range(40, 80) for alarm in guard.judge(n, 0.5 + 0.001 * n, 2.0).alarms]
    first = alarms[0]
    assert (first.kind, first.ended, first.step, first.since) == ("loss_drop", False, 48, 41)
    assert alarms[-1].ended
    drop = Drop()
    assert [drop.add(1.0, 2.0 if n % 7 else None) for n in range(30)] == [None] * 30, "never long enough"


def test_growing_weights_are_an_alarm() -> None:
    guard = Guard(GuardConfig(weight_growth=3.0))
    assert guard.judge_weights(100, {"router of layers.1": 0.02, "output layer": 0.02}) == []
    assert guard.judge_weights(200, {"router of layers.1": 0.05, "output layer": 0.02}) == []
    (alarm,) = guard.judge_weights(300, {"router of layers.1": 0.07, "output layer": 0.02})
    assert (alarm.kind, alarm.layer, alarm.value) == ("router_growth", "router of layers.1", pytest.approx(3.5))
    assert guard.judge_weights(400, {"router of layers.1": 0.08, "output layer": 0.02}) == [], "told once"
    ended, head = guard.judge_weights(500, {"router of layers.1": 0.01, "output layer": 0.1})
    assert (ended.ended, ended.since) == (True, 300)
    assert head.kind == "logit_growth"


def test_robust_figures_hardly_feel_wild_values() -> None:
    values = [wave(n) for n in range(50)]
    middle, sigma = robust(values)
    wild_middle, wild_sigma = robust([*values[:-4], 1e9, 1e9, 1e9, 1e9])
    assert wild_middle == pytest.approx(middle, abs=0.03)
    assert wild_sigma == pytest.approx(sigma, rel=0.3)


def test_a_window_keeps_the_newest() -> None:
    window = Window(16, 10.0, 0.2)
    for _ in range(8):
        assert window.bounds() is None
        window.add(100.0)
    assert window.bounds() == (80.0, 120.0)
    for _ in range(16):
        window.add(1.0)
    assert window.bounds() == (0.8, 1.2)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"max_skips": 0}, "max_skips"), ({"spike_window": 4}, "spike_window"), ({"spike_sigmas": 1.0}, "spike_sigmas"),
     ({"rollback_steps": -1}, "rollback_steps"), ({"weight_growth": 0.5}, "weight_growth"),
     ({"check_replicas_every_steps": -5}, "check_replicas_every_steps")],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict, key: str) -> None:
    (problem,) = GuardConfig(**change).problems()
    assert problem.startswith(f"guard.{key} = ")
    assert GuardConfig().problems() == []


def test_where_something_changed_on_purpose_nothing_is_a_spike_until_there_is_something_to_compare_with() -> None:
    guard = settled()
    guard.judge(40, 9.0, 2.0)
    guard.afresh()
    assert not guard.judge(41, math.nan, 9.0).keep
    for step in range(42, 42 + 7):
        assert guard.judge(step, 9.0 + wave(step), 20.0) == Verdict(True)
    guard.judge(50, 9.0, 20.0)
    assert guard.judge(51, 90.0, 20.0).kind == "spike"
    drifting = Guard(GuardConfig(spike_window=0, drift_window=4))
    for step in range(13):
        drifting.judge(step, 2.0 + 0.05 * step, 1.0)
    drifting.afresh()
    assert all(drifting.judge(20 + n, 5.0 + 0.05 * n, 1.0).alarms == () for n in range(8)), "three rises need more"


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"), (13, "13th"),
     (21, "21st"), (22, "22nd"), (101, "101st"), (111, "111th"), (112, "112th"), (123, "123rd")],
)  # fmt: skip
def test_ordinals(number: int, word: str) -> None:
    assert ordinal(number) == word
