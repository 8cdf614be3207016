"""The guard on the balance: each alarm at the right step, once, with its place; the same after a resume anywhere."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.alarms import Alarm, Alarms, actions
from launch.balance_stats import rank_loads
from parallel.config import BalanceConfig

LAYERS = ["layer 1", "layer 2"]
OFF = {"alarm_max_vio": 0.0, "alarm_dead_steps": 0, "alarm_rank_vio": 0.0}
EVEN = [4, 4, 4, 4]
SKEWED = [10, 2, 2, 2]  # max_vio 1.5; over two ranks 0.5, with rank 0 the busiest
DEAD = [6, 5, 5, 0]  # max_vio 0.5


def alarms(**config: Any) -> Alarms:
    return Alarms(BalanceConfig(**{**OFF, **config}), LAYERS, 4)


def run(judge: Alarms, steps: list[list[list[int]]], first: int = 1) -> list[Alarm]:
    found = []
    for step, rows in enumerate(steps, start=first):
        counts = np.array(rows, dtype=np.int64)
        found += judge.judge(step, counts, rank_loads(counts, 2))
    return found


def test_max_vio_is_told_after_the_patience_once_and_with_its_place() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_patience_steps=3, on_max_vio="save")
    (alarm,) = run(judge, [[EVEN, SKEWED]] * 8)
    assert (alarm.kind, alarm.layer, alarm.expert, alarm.rank) == ("max_vio", "layer 2", 0, None)
    assert (alarm.step, alarm.since, alarm.value, alarm.limit, alarm.action) == (3, 1, 1.5, 1.0, "save")
    assert alarm.cause == (
        "layer 2: max_vio has been above 1 for 3 steps, now 1.5 with expert 0 the busiest; a checkpoint is saved"
    )


def test_the_row_must_not_break() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_patience_steps=3)
    assert run(judge, [[SKEWED, EVEN], [SKEWED, EVEN], [EVEN, EVEN]] * 4) == []


def test_the_limit_itself_is_allowed() -> None:
    assert run(alarms(alarm_max_vio=1.5, alarm_patience_steps=1), [[SKEWED, SKEWED]] * 3) == []


def test_the_end_is_told_and_then_the_alarm_may_come_again() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_patience_steps=2, on_max_vio="stop")
    found = run(judge, [[SKEWED, EVEN]] * 4 + [[EVEN, EVEN]] * 2 + [[SKEWED, EVEN]] * 3)
    assert [(alarm.step, alarm.ended, alarm.action, alarm.since) for alarm in found] == [
        (2, False, "stop", 1), (5, True, "log", 1), (8, False, "stop", 7),
    ]  # fmt: skip
    assert found[1].cause == "ended: layer 1: max_vio is back at 0, after 4 steps above 1"


def test_a_dead_expert_is_named_with_its_layer() -> None:
    judge = alarms(alarm_dead_steps=3)
    found = run(judge, [[EVEN, DEAD]] * 5 + [[EVEN, EVEN]])
    assert [(a.kind, a.step, a.layer, a.expert, a.value, a.limit, a.ended) for a in found] == [
        ("dead_expert", 3, "layer 2", 3, 3, 3, False), ("dead_expert", 6, "layer 2", 3, 5, 3, True),
    ]  # fmt: skip
    assert found[0].cause == "layer 2: expert 3 has had no token for 3 steps"
    assert found[1].cause == "ended: layer 2: expert 3 has a token again, after 5 steps without"


def test_the_busiest_rank_is_named() -> None:
    judge = alarms(alarm_rank_vio=0.4, alarm_patience_steps=2, on_rank_vio="raise_rate", raise_rate_steps=50)
    (alarm,) = run(judge, [[[2, 2, 2, 10], EVEN]] * 3)
    assert (alarm.kind, alarm.layer, alarm.expert, alarm.rank, alarm.value) == ("rank_vio", "layer 1", None, 1, 0.5)
    assert alarm.cause == (
        "layer 1: max_vio over ranks has been above 0.4 for 2 steps, now 0.5 with rank 1 the busiest; "
        "the rate is 10 times as high for 50 steps"
    )
    assert alarm.fields() == {
        "cause": alarm.cause, "step": 2, "alarm": "rank_vio", "layer": "layer 1", "rank": 1, "value": 0.5,
        "limit": 0.4, "action": "raise_rate", "since": 1, "ended": False,
    }  # fmt: skip


def test_skew_of_experts_is_no_skew_of_ranks() -> None:
    judge = alarms(alarm_rank_vio=0.1, alarm_max_vio=0.4, alarm_patience_steps=1)
    assert {a.kind for a in run(judge, [[[7, 1, 1, 7], EVEN]])} == {"max_vio"}


def test_what_is_asked_for_together() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_dead_steps=1, alarm_patience_steps=1, on_max_vio="save")
    assert actions(run(judge, [[EVEN, DEAD]])) == set()  # only logged
    both = alarms(alarm_max_vio=1.0, alarm_dead_steps=1, alarm_patience_steps=1, on_max_vio="save",
                  on_dead_expert="stop")  # fmt: skip
    assert actions(run(both, [[SKEWED, [16, 0, 0, 0]]])) == {"save", "stop"}
    assert actions(run(both, [[EVEN, EVEN]], first=2)) == set()  # ends ask for nothing


def test_every_alarm_is_off_at_zero() -> None:
    judge = alarms(alarm_patience_steps=1)
    assert run(judge, [[[16, 0, 0, 0]] * 2] * 300) == [] and judge.state() == {}


def test_a_layer_without_tokens_says_nothing() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_dead_steps=3, alarm_patience_steps=3)
    skewed_and_dead, nothing = [16, 0, 0, 0], [0, 0, 0, 0]
    found = run(judge, [[EVEN, skewed_and_dead]] * 2 + [[EVEN, nothing]] * 5 + [[EVEN, skewed_and_dead]])
    assert [(a.kind, a.step, a.expert) for a in found] == [
        ("max_vio", 8, 0), ("dead_expert", 8, 1), ("dead_expert", 8, 2), ("dead_expert", 8, 3),
    ]  # fmt: skip


def test_skipped_steps_neither_go_on_with_a_row_nor_end_it() -> None:
    judge = alarms(alarm_dead_steps=3)
    counts = np.array([EVEN, DEAD])
    found = [judge.judge(step, counts, rank_loads(counts, 2)) for step in (4, 5, 9)]  # 6 to 8 were skipped
    assert found[:2] == [[], []] and (found[2][0].step, found[2][0].since, found[2][0].value) == (9, 4, 3)


def test_torch_counts_and_dense_models_are_judged_too() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_dead_steps=1, alarm_rank_vio=0.1, alarm_patience_steps=1)
    counts = torch.tensor([EVEN, SKEWED])
    assert [a.kind for a in judge.judge(1, counts, rank_loads(counts, 2))] == ["max_vio", "rank_vio"]
    dense = Alarms(BalanceConfig(alarm_max_vio=1.0, alarm_rank_vio=0.1), [], 0)
    none = torch.zeros(0, 0, dtype=torch.int64)
    assert dense.judge(1, none, rank_loads(none, 2)) == []


# --- by a literal reading of the rules, and across resumes ---


def literal(steps: list[list[list[int]]], config: BalanceConfig) -> list[tuple[Any, ...]]:
    """The same rules in plain loops: (kind, step, layer, expert or rank, ended)."""
    found = []
    rows: dict[Any, int] = {}
    told: set[Any] = set()
    for step, layers in enumerate(steps, start=1):
        for kind in ("max_vio", "dead_expert", "rank_vio"):
            raised, ended = [], []
            for layer, loads in enumerate(layers):
                total = sum(loads)
                if total == 0:
                    continue
                ranks = [loads[0] + loads[1], loads[2] + loads[3]]
                if kind == "max_vio":
                    places = [(None, loads.index(max(loads)), max(loads) * 4 / total - 1 > config.alarm_max_vio)]
                    patience = config.alarm_patience_steps
                elif kind == "rank_vio":
                    places = [(None, ranks.index(max(ranks)), max(ranks) * 2 / total - 1 > config.alarm_rank_vio)]
                    patience = config.alarm_patience_steps
                else:
                    places = [(e, e, load == 0) for e, load in enumerate(loads)]
                    patience = config.alarm_dead_steps
                for key_part, unit, holds in places:
                    key = (kind, layer, key_part)
                    rows[key] = rows.get(key, 0) + 1 if holds else 0
                    if rows[key] >= patience and key not in told:
                        told.add(key)
                        raised.append((kind, step, LAYERS[layer], unit, False))
                    elif not holds and key in told:
                        told.remove(key)
                        ended.append((kind, step, LAYERS[layer], unit, True))
            found += raised + ended
    return found


LOADS = st.sampled_from([EVEN, SKEWED, DEAD, [0, 0, 8, 8], [16, 0, 0, 0], [0, 0, 0, 0]])
HISTORIES = st.lists(st.tuples(LOADS, LOADS).map(list), min_size=1, max_size=24)
LIMITS = {"alarm_max_vio": 0.75, "alarm_rank_vio": 0.3}


@settings(max_examples=150, deadline=None)
@given(HISTORIES, st.integers(1, 4), st.integers(1, 4))
def test_alarms_are_the_literal_rules(steps: list[list[list[int]]], patience: int, dead_steps: int) -> None:
    config = BalanceConfig(**LIMITS, alarm_dead_steps=dead_steps, alarm_patience_steps=patience)
    found = run(Alarms(config, LAYERS, 4), steps)
    shown = [(a.kind, a.step, a.layer, a.expert if a.rank is None else a.rank, a.ended) for a in found]
    assert shown == literal(steps, config)


@settings(max_examples=150, deadline=None)
@given(HISTORIES, st.integers(1, 4), st.data())
def test_a_resume_at_any_step_changes_no_alarm(
    steps: list[list[list[int]]], patience: int, data: st.DataObject
) -> None:
    config = BalanceConfig(**LIMITS, alarm_dead_steps=3, alarm_patience_steps=patience)
    undisturbed = run(Alarms(config, LAYERS, 4), steps)
    cut = data.draw(st.integers(0, len(steps)))
    first = Alarms(config, LAYERS, 4)
    found = run(first, steps[:cut])
    saved = json.dumps(first.state(), allow_nan=False)
    second = Alarms(config, LAYERS, 4)
    second.load_state(json.loads(saved))
    assert second.state() == json.loads(saved)
    assert found + run(second, steps[cut:], first=cut + 1) == undisturbed


def test_the_saved_state_holds_only_what_is_going_on() -> None:
    judge = alarms(alarm_dead_steps=2, alarm_max_vio=1.0, alarm_patience_steps=5)
    run(judge, [[EVEN, DEAD], [SKEWED, DEAD]])
    assert judge.state() == {"max_vio": [[0, 1, 2, 0]], "dead_expert": [[1, 3, 2, 1, 1]]}


def test_loading_forgets_what_was_there_and_what_is_now_off() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_patience_steps=2)
    run(judge, [[SKEWED, SKEWED]])
    judge.load_state({"rank_vio": [[0, 1, 1, 0]]})
    assert judge.state() == {"max_vio": []}
    assert run(judge, [[SKEWED, SKEWED]], first=2) == []


def test_a_state_of_another_model_is_refused() -> None:
    for place in ([2, 0], [0, 4]):
        with pytest.raises(ValueError, match=r"model of another size"):
            alarms(alarm_dead_steps=3).load_state({"dead_expert": [[*place, 1, 1, 0]]})


def test_values_stay_plain_numbers() -> None:
    judge = alarms(alarm_max_vio=1.0, alarm_dead_steps=1, alarm_rank_vio=0.1, alarm_patience_steps=1)
    for alarm in run(judge, [[SKEWED, DEAD], [EVEN, EVEN]]):
        assert json.loads(json.dumps(alarm.fields())) == alarm.fields()
        assert math.isfinite(alarm.value)
