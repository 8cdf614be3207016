"""Balance as a user has it: every rule trains, its figures are written, and alarms act."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import events, metrics

# Several commands in one process, without the measurement of the machine's peak: the start costs more than the steps.
DRIVER = """
import json, sys
import launch.train
from launch.cli import main
launch.train.peak_flops = lambda device, precision: (1.0, "not measured")
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""
RULES = {"sign": 0.02, "proportional": 0.05, "quantile": 0.5, "aux_loss": None, "none": None}


@pytest.fixture
def launch(trimtab: Any, config: Path, tmp_path: Path) -> Callable[..., list[int]]:
    """Trains on two virtual ranks, once for each list of arguments; returns the exit statuses."""

    def run(*runs: list[Any]) -> list[int]:
        (tmp_path / "driver.py").write_text(DRIVER)
        common = ["train", config, "--launcher", "debug", "--no-summary", "parallel.virtual_ranks=2"]
        common += ["parallel.recompute=true", "balance.check_every_steps=1"]
        commands = json.dumps([[str(word) for word in (*common, *arguments)] for arguments in runs])
        done = trimtab(commands, command=[sys.executable, str(tmp_path / "driver.py")])
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def alarms(run: Path) -> list[dict]:
    """What was raised and ended, without times."""
    told = [event for event in events(run) if event["kind"] == "alarm"]
    return [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in told]


def test_every_rule_trains_and_writes_its_figures(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    runs = []
    for rule, rate in RULES.items():
        runs.append(["--run", tmp_path / rule, "train.steps=3", f"balance.rule={rule}"])
        if rate:
            runs[-1] += [f"balance.rate={rate}", "balance.rate_warmup_steps=2"]
    assert launch(*runs) == [0] * len(RULES)
    for rule, rate in RULES.items():
        records = metrics(tmp_path / rule)
        assert [record["step"] for record in records] == [1, 2, 3]
        rates = [rate / 2, rate, rate] if rate else [0.0] * 3
        assert [record["bias_rate"] for record in records] == pytest.approx(rates), rule
        for record in records:
            assert 0 < record["gate_entropy"] <= math.log(8) + 1e-6
            assert record["waiting_seconds"] >= 0
            assert record["bytes_sent"] > 0
        assert (records[-1]["bias_abs_max"] > 0) == (rate is not None), rule


def test_alarms_act(launch: Callable[..., list[int]], tmp_path: Path) -> None:
    """The limit is one that any routing breaks: raised at step 2, when it has held for two steps."""
    watched = ["balance.alarm_max_vio=0.001", "balance.alarm_patience_steps=2", "balance.alarm_dead_steps=0"]
    watched += ["balance.rate=0.0001", "checkpoint.every_steps=100", "checkpoint.keep=9"]
    faster = [
        "balance.raise_rate_factor=5",
        "balance.raise_rate_steps=2",
        "train.steps=6",
        "optimizer.schedule=constant",
    ]
    halves = ["--run", tmp_path / "halves", *watched, *faster, "balance.on_max_vio=raise_rate"]
    assert launch(
        ["--run", tmp_path / "raise", *watched, *faster, "balance.on_max_vio=raise_rate"],
        [*halves, "train.steps=3"],
        [*halves, "train.steps=6"],
        ["--run", tmp_path / "save", *watched, "train.steps=4", "balance.on_max_vio=save"],
        ["--run", tmp_path / "stop", *watched, "train.steps=4", "balance.on_max_vio=stop"],
        ["--run", tmp_path / "stop", *watched, "train.steps=4", "balance.on_max_vio=stop"],
    ) == [0, 0, 0, 0, 75, 0]

    raised = alarms(tmp_path / "raise")
    layers = ["layer 1", "layer 2", "mtp 0"]
    first = [alarm for alarm in raised if alarm["step"] == 2]
    assert [alarm["layer"] for alarm in first] == layers
    for alarm in first:
        loads = metrics(tmp_path / "raise")[1]["tokens_per_expert"][layers.index(alarm["layer"])]
        assert alarm["expert"] == loads.index(max(loads))
        assert (alarm["alarm"], alarm["action"], alarm["ended"]) == ("max_vio", "raise_rate", False)
    rates = [record["bias_rate"] for record in metrics(tmp_path / "raise")]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-4, 5e-4, 1e-4, 1e-4])

    assert alarms(tmp_path / "halves") == raised, "a resumed run raises the same alarms"
    for key in ("bias_rate", "expert_bias", "tokens_per_expert"):
        whole, halves_have = ([record[key] for record in metrics(tmp_path / run)] for run in ("raise", "halves"))
        assert halves_have == whole, key

    def saves(run: str) -> list[tuple[int, str]]:
        return [(event["step"], event["cause"]) for event in events(tmp_path / run) if event["kind"] == "save"]

    assert saves("save") == [(2, "an alarm asks for it"), (4, "end of training")]
    assert saves("stop") == [(2, "an alarm stops the run"), (4, "end of training")]
    assert (tmp_path / "stop" / "checkpoints" / "step-00000002" / "COMMIT").is_file()
    assert {alarm["step"] for alarm in alarms(tmp_path / "stop") if not alarm["ended"]} == {2}, "told once, not again"
    assert [record["step"] for record in metrics(tmp_path / "stop")] == [1, 2, 3, 4]
