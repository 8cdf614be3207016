"""The supervisor around real processes of the local launcher: kills, mistakes, signals, and the events they leave."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import local
from cluster.config import ClusterConfig
from data.mixture import open_data, plan_of
from launch.config import Config
from launch.preflight import Plan
from launch.start import _record_end
from launch.supervise import run_supervised
from tests.faults.conftest import events

ONCE = {"step": 0, "rank": 0, "do": ""}


def supervised(run: Path, script: list[dict], commit: int = 2, data: Path | None = None, said=None, **cluster):
    """Runs the toy training under the supervisor, as `launch.start` does; returns the result."""
    settings = {"backoff_s": 0.0, "failure_grace_s": 0.5, "threads_per_worker": 1, **cluster}
    config = replace(Config(), cluster=ClusterConfig(workers=2, **settings))
    if data is not None:
        config = replace(config, data=replace(config.data, path=str(data), seq_len=32))
    plan = Plan(config, run, "local", 2, "auto", (), "", False, ())
    run.mkdir(parents=True, exist_ok=True)
    payload = {"run": str(run), "script": script, "commit": commit}

    def launch(generation, told, signals):
        return local.run(
            "tests.faults.entries:toy", told, config.cluster, log_dir=run / "logs", generation=generation.number,
            stop=signals.stop, on_output=lambda text: None,
        )  # fmt: skip

    result = run_supervised(plan, payload, launch, (said if said is not None else []).append)
    _record_end(plan, result, 0.0)
    return result


def test_a_killed_rank_is_an_event_that_a_program_can_read(tmp_path: Path) -> None:
    said: list[str] = []
    result = supervised(tmp_path, [{"step": 4, "rank": 1, "do": "kill"}, ONCE], said=said)
    assert (result.exit_code, result.results) == (0, [{"status": "done", "step": 6}] * 2)
    [event] = events(tmp_path, "restart")
    wanted = {
        "cause": "worker", "rank": 1, "signal": 9, "section": "forward", "failed_step": 4, "generation": 1, "step": 2,
        "workers": 2,
    }  # fmt: skip
    assert {key: event[key] for key in wanted} == wanted
    assert event["seconds_detection"] < 5 and event["seconds_teardown"] < 5
    assert said[0].startswith("rank 1 failed in step 4 (worker): its process was killed by SIGKILL")
    assert "restart 1: from step 2 with 2 workers" in said


def test_crashes_at_ever_later_steps_go_on_and_at_one_step_they_end(tmp_path: Path, dataset: Path) -> None:
    later = [{"step": step, "rank": 1, "do": "kill"} for step in range(2, 7)]
    assert supervised(tmp_path / "later", [*later, ONCE], commit=1, restarts=1).exit_code == 0
    assert [event["failed_step"] for event in events(tmp_path / "later", "restart")] == [2, 3, 4, 5, 6]

    run = tmp_path / "poison"
    result = supervised(run, [{"step": 4, "rank": 1, "do": "exit"}], data=dataset)
    assert (result.exit_code, result.reason) == (3, "poison")
    assert [event["cause"] for event in events(run, "restart")] == ["worker"] * 2
    [failure] = events(run, "failure")
    assert (failure["cause"], failure["reason"], failure["failed_step"], failure["generation"]) == (
        "worker", "poison", 4, 2,
    )  # fmt: skip
    dump = json.loads((run / "failed-step-00000004.json").read_text())
    assert f"its samples are listed in {run / 'failed-step-00000004.json'}" in result.error
    data, batch_size = replace(Config().data, path=str(dataset), seq_len=32), Config().train.global_batch_size
    opened = open_data(data)
    assert dump["sequence_ids"] == plan_of(opened, data, batch_size).batch(3, batch_size).tolist()
    opened.close()
    assert dump["step"] == 4 and len(dump["sequence_ids"]) == batch_size
    assert {one["sequence"] for one in dump["documents"]} == set(dump["sequence_ids"])
    assert all(one["shard"].endswith(".tar") and one["name"].endswith(".py") for one in dump["documents"])


def test_a_mistake_is_told_whole_and_not_tried_again(tmp_path: Path) -> None:
    result = supervised(tmp_path, [{"step": 0, "rank": 1, "do": "type_error"}])
    assert (result.exit_code, result.reason) == (1, "user_error")
    assert "TypeError: a mistake of the user's\nin two lines" in result.error
    [failure] = events(tmp_path, "failure")
    assert (failure["cause"], failure["exception"], failure["section"]) == ("user_error", "TypeError", "start")
    assert events(tmp_path, "restart") == []


def test_storage_and_a_signal_to_one_rank_are_told_apart(tmp_path: Path) -> None:
    script = [{"step": 3, "rank": 0, "do": "os_error"}, {"step": 4, "rank": 1, "do": "sigterm"}, ONCE]
    assert supervised(tmp_path, script).exit_code == 0
    first, second = events(tmp_path, "restart")
    assert (first["cause"], first["exception"], first["step"]) == ("storage", "OSError", 2)
    assert (second["cause"], second["step"]) == ("preemption", 2)


@pytest.mark.parametrize("commit", [1, 6])
def test_a_signal_during_the_wait_stops_cleanly_with_what_is_committed(tmp_path: Path, commit: int) -> None:
    said: list[str] = []

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not any("starting again in 60 s" in line for line in said) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    began = time.monotonic()
    result = supervised(tmp_path, [{"step": 4, "rank": 1, "do": "kill"}], commit, said=said, backoff_s=60.0)
    thread.join()
    assert time.monotonic() - began < 30
    if commit == 1:
        assert (result.exit_code, result.results) == (75, [{"status": "stopped", "step": 3}])
        assert [event["step"] for event in events(tmp_path, "stop")] == [3]
    else:
        assert result.exit_code == 1 and "before there was any checkpoint" in result.error
    assert events(tmp_path, "restart") == []
