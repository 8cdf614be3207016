"""A rank killed in the middle of training: the run goes on by itself, and its history is the undisturbed one."""

import json
from pathlib import Path

import pytest

from tests.faults.conftest import assert_one_history, committed_steps, events, train


@pytest.mark.slow
def test_a_rank_killed_in_backward_leaves_no_trace_in_the_history(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    fault = "kill@rank=1,step=5,phase=backward"
    done = train(config, tmp_path / "run", f"faults.inject={fault}")
    assert done.returncode == 0, done.stdout + done.stderr
    [event] = events(tmp_path / "run", "restart")
    wanted = {"cause": "worker", "rank": 1, "signal": 9, "section": "backward", "failed_step": 5, "generation": 1}
    assert {key: event[key] for key in wanted} == wanted
    assert event["step"] in (2, 4)  # the save of step 4 may not have been published yet
    assert [resumed["step"] for resumed in events(tmp_path / "run", "resume")] == [event["step"]]
    assert event["seconds_teardown"] < 5  # the other rank did not wait for its collective to time out
    [recovered] = events(tmp_path / "run", "recovered")
    parts = sum(value for key, value in recovered.items() if key.startswith("seconds_") and key != "seconds_in_all")
    assert recovered["cause"] == "worker" and abs(parts - recovered["seconds_in_all"]) < 0.1
    [struck] = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert (struck["fault"], struck["generation"]) == (fault, 0)
    assert committed_steps(tmp_path / "run")[-1] == 6
    assert_one_history(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_mistake_in_the_start_is_told_whole_and_not_tried_again(config: Path, tmp_path: Path) -> None:
    done = train(config, tmp_path / "run", "faults.inject=raise@rank=1,phase=start")
    assert done.returncode == 1
    assert "DrillError: asked for by faults.inject = 'raise@rank=1,phase=start'" in done.stderr
    assert "Traceback" in done.stderr and "in _watch" in done.stderr
    [failure] = events(tmp_path / "run", "failure")
    assert (failure["cause"], failure["exception"], failure["rank"]) == ("user_error", "DrillError", 1)
    assert events(tmp_path / "run", "restart") == []
