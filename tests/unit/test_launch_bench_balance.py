"""`trimtab bench balance`: arms that differ in one thing only, the dense twin, aggregation, floors, jobs."""

import dataclasses
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.balance_stats import noise_floor
from launch.bench_balance_arms import (
    DENSE,
    OTHERS,
    RULES,
    SEARCH,
    SETTINGS,
    TOP2,
    WEAK,
    Setting,
    dense_twin,
    make_config,
    search_trainings,
    trainings,
)
from launch.bench_balance_data import AT_MOST, passages
from launch.bench_balance_table import FIGURES, aggregate, render, verdicts
from launch.bench_jobs import Job, JobError, run_jobs
from launch.bench_record import Spread
from launch.config import Config, ConfigError
from launch.document_floor import document_floor
from model.config import ModelConfig
from model.count import count_parameters


def differing(one: Any, other: Any, path: str = "") -> set[str]:
    """Dotted keys in which two configurations differ."""
    found: set[str] = set()
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            found |= differing(mine, theirs, f"{path}{field.name}.")
        elif mine != theirs:
            found.add(path + field.name)
    return found


def test_arms_differ_in_what_is_compared_and_nothing_else() -> None:
    found = trainings("somewhere", 600, RULES, OTHERS, range(3))
    assert [one.name for one in found[:8]] == [f"{arm}-seed0" for arm in (*RULES, WEAK, DENSE, TOP2)]
    assert len({one.name for one in found}) == len(found) == 24
    base = found[0].config
    for one in found:
        assert not one.config.problems()
        allowed = {
            DENSE: {"model.first_k_dense_replace", "model.intermediate_size"},
            TOP2: {"model.num_experts_per_tok"},
        }
        changed = {key for key in differing(base, one.config) if not key.startswith("balance.")}
        seeds = {"train.seed", "data.seed"} if one.seed else set()
        assert changed == allowed.get(one.arm, set()) | seeds
        assert (one.config.train.seed, one.config.data.seed) == (one.seed, one.seed)
    by_arm = {one.arm: one.config for one in found}
    assert by_arm[TOP2].balance == by_arm["sign"].balance and by_arm[TOP2].model.num_experts_per_tok == 2
    assert {by_arm[rule].balance.rule for rule in RULES} == set(RULES)
    assert (by_arm[WEAK].balance.rule, by_arm[WEAK].balance.aux_loss_coef) == ("aux_loss", 0.001)


def test_the_search_makes_as_many_tries_for_every_rule_and_none_under_a_measured_seed() -> None:
    assert {len(tries) for tries in SEARCH.values()} == {4}
    assert set(SEARCH) == set(RULES) - {"none"}
    assert all(SETTINGS[rule] in tries for rule, tries in SEARCH.items())
    for steps in (10, 600):
        found = search_trainings("somewhere", steps, RULES, seed=100)
        assert len(found) == 16 and not any(problem for one in found for problem in one.config.problems())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting(0.01), {"rate": 0.01}),
        (Setting(0.01, "step", zero_at=0.9), {"rate": 0.01, "rate_schedule": "step", "rate_zero_at": 540}),
        (
            Setting(0.1, "linear", 0.5),
            {"rate": 0.1, "rate_schedule": "linear", "rate_anneal_from": 300, "rate_zero_at": 600},
        ),
        (Setting(aux_loss_coef=0.03), {"aux_loss_coef": 0.03}),
    ],
)
def test_a_setting_becomes_steps(setting: Setting, expected: dict[str, Any]) -> None:
    assert setting.table("sign", 600) == {"rule": "sign", **expected}


def test_assignments_reach_every_arm_and_mistakes_are_named() -> None:
    found = trainings("x", 20, ["none"], [DENSE], [0], ["model.hidden_size=64", "train.micro_batch_size=4"])
    assert {one.config.model.hidden_size for one in found} == {64}
    assert {one.config.train.micro_batch_size for one in found} == {4}
    for wrong in ("model.hidden=64", "model.hidden_size", "model.n_group=5"):
        with pytest.raises(ConfigError, match=r"model\.(hidden|n_group)"):
            make_config("x", 20, [wrong], {"rule": "none"}, 0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts_per_tok": 2}, {"n_routed_experts": 64, "num_experts_per_tok": 6}, {"n_shared_experts": 0},
     {"num_hidden_layers": 8, "hidden_size": 64, "moe_intermediate_size": 32}],
)  # fmt: skip
def test_the_dense_twin_has_the_active_parameters_and_no_experts(changes: dict[str, int]) -> None:
    model = replace(make_config("x", 20, [], {"rule": "none"}, 0).model, **changes)
    twin = dense_twin(model)
    wanted, counted = count_parameters(model).active, count_parameters(twin)
    assert counted.total == counted.active and not twin.moe_layers and not twin.problems()
    assert abs(counted.active - wanted) <= 0.01 * wanted


def test_no_dense_twin_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 1"):
        dense_twin(replace(Config().model, num_nextn_predict_layers=1))
    coarse = ModelConfig(
        vocab_size=1, hidden_size=2, num_hidden_layers=40, num_nextn_predict_layers=0, num_attention_heads=1,
        kv_lora_rank=1, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=1, first_k_dense_replace=20,
        intermediate_size=1, moe_intermediate_size=1, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=0,
        n_group=1, topk_group=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no dense model has the"):
        dense_twin(coarse)  # a unit of width is 240 of 1,442 parameters


def result(arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A training's result with made-up figures."""
    found = dict.fromkeys(FIGURES, 0.5) | {"heldout_floor": 0.01, "heldout_max_vio": 0.04, "heldout_loss": 3.0 + seed}
    facts = {"setting": "rate 1", "parameters": 10, "active_parameters": 5, "heldout_tokens": 7, "heldout_documents": 3}
    return {"arm": arm, "seed": seed, **found, **facts, **changes}


def test_rows_hold_the_spread_over_seeds() -> None:
    dense = dict.fromkeys((key for key in FIGURES if "vio" in key or "floor" in key or key == "gate_entropy"), None)
    rows = aggregate(
        [
            result("sign", 0),
            result("dense", 0, **dense),
            result("sign", 2),
            result("sign", 1),
            result("dense", 1, **dense),
        ]
    )
    assert [(row["arm"], row["seeds"]) for row in rows] == [("sign", 3), ("dense", 2)]
    assert rows[0]["heldout_loss"] == Spread(4.0, 3.0, 5.0, 3)
    assert rows[1]["heldout_loss"] == Spread(3.5, 3.0, 4.0, 2)
    assert rows[1]["heldout_max_vio"] is None and rows[1]["setting"] == "rate 1"
    text = render(rows)
    assert "0.040 (0.010)" in text and "3.000 to 5.000" in text
    assert text.splitlines()[3].split() == ["dense", "3.500", "0.500", "-", "-", "-", "-", "-", "0"]


def test_results_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="two results of one seed"):
        aggregate([result("sign", 1), result("sign", 1)])
    with pytest.raises(ValueError, match="setting differs"):
        aggregate([result("sign", 1), result("sign", 2, setting="rate 2")])


@pytest.mark.parametrize(("max_vio", "said"), [(0.0599, ": reached"), (0.0601, ": NOT reached")])
def test_the_verdict_is_the_best_rules(max_vio: float, said: str) -> None:
    rows = aggregate(
        [result("sign", 0, heldout_max_vio=0.3), result("aux_loss", 0, heldout_max_vio=0.6, heldout_loss=3.25),
         result("quantile", 0, heldout_max_vio=max_vio), result("top-2", 0, setting="sign, rate 1", heldout_loss=3.5)]
    )  # fmt: skip
    first, *others = verdicts(rows)
    assert first.startswith("quantile is the most even") and said in first
    assert others[0] == "sign: 0.50 times the held-out max_vio of aux_loss at -0.2500 nats a token"
    assert others[-1] == "top-2 (5 active parameters): +0.5000 nats a token beside sign (5)"


def test_passages_add_up_and_begin_with_definitions() -> None:
    text = "".join(f"def f{i}():\n    x = {i}\n\n    return x\n\n" for i in range(400))
    found = list(passages(text))
    assert "".join(found) == text and len(found) > 5
    assert all(piece.startswith("def ") for piece in found)
    dense = "".join(f"line {i}\n" for i in range(2000))
    assert "".join(passages(dense)) == dense
    assert all(len(piece) <= AT_MOST + 10 for piece in passages(dense))
    assert list(passages("")) == [] and list(passages("x")) == ["x"]


def test_the_floor_of_documents_is_that_of_tokens_only_where_tokens_are_independent() -> None:
    draw = np.random.default_rng(0)
    experts, documents, tokens = 16, 400, 50
    single = draw.multinomial(tokens, np.full(experts, 1 / experts), size=(documents, 2))  # (D, M, E)
    floor = noise_floor(experts, documents * tokens)
    assert document_floor(single) == pytest.approx(floor, rel=0.35)  # the formula is an upper estimate
    # every document has one expert only: its 50 tokens act as one
    whole = tokens * np.eye(experts, dtype=np.int64)[draw.integers(0, experts, (documents, 2))]
    assert document_floor(whole) == pytest.approx(math.sqrt(tokens) * document_floor(single), rel=0.25)
    # what all documents share is not chance: an uneven router's floor is as low as a fair one's
    uneven = single.copy()
    uneven[:, :, 0] += tokens
    assert document_floor(uneven) < 2 * document_floor(single)
    assert math.isnan(document_floor(np.zeros((0, 2, 4), np.int64)))


SCRIPT = "import os, sys, time\nprint('threads', os.environ['OMP_NUM_THREADS'])\n"


def job(folder: Path, name: str, code: str) -> Job:
    (folder / f"job_{name}.py").write_text(SCRIPT + code)
    return Job(name, f"job_{name}", (), folder / "logs" / f"{name}.log")


def test_jobs_run_side_by_side_and_a_failure_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done: list[str] = []
    waits_for_second = "while not os.path.exists(sys.path[-1] or '.') or not os.path.exists(FLAG): time.sleep(0.02)\n"
    flag = tmp_path / "flag"
    first = job(tmp_path, "first", f"FLAG = {str(flag)!r}\n{waits_for_second}")
    second = job(tmp_path, "second", f"open({str(flag)!r}, 'w').close()\n")
    run_jobs([first, second], 2, lambda one: done.append(one.name), lambda jobs: None)
    assert sorted(done) == ["first", "second"]
    assert first.log.read_text() == "threads 1\n"
    endless = job(
        tmp_path, "endless", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    pid = tmp_path / "pid"
    broken = job(
        tmp_path, "broken",
        f"while not os.path.exists({str(pid)!r}) or not open({str(pid)!r}).read(): time.sleep(0.02)\n"
        "sys.exit('it broke')\n",
    )  # fmt: skip
    with pytest.raises(JobError, match=r"broken ended with status 1; .*broken\.log says:\n(.*\n)*it broke"):
        run_jobs([endless, broken], 2, lambda one: None, lambda jobs: None)
    if sys.platform == "linux":
        assert not Path("/proc", pid.read_text()).exists()
