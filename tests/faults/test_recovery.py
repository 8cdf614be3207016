"""A rank killed in the middle of training: the run goes on by itself, and its history is the undisturbed one."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from tests.faults.conftest import assert_one_history, committed_steps, events, train

KILL, SLOW = "kill@rank=1,step=5,phase=backward", "slow@rank=1,times=0,seconds=0.1"


@pytest.fixture(scope="module")
def killed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rank 1 is slow in every forward pass, and is killed in step 5."""
    run = tmp_path_factory.mktemp("killed") / "run"
    done = train(config, run, f"faults.inject={KILL};{SLOW}", "telemetry.straggler_window=3")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.mark.slow
def test_a_rank_killed_in_backward_leaves_no_trace_in_the_history(killed: Path, undisturbed: Path) -> None:
    [event] = events(killed, "restart")
    wanted = {"cause": "worker", "rank": 1, "signal": 9, "section": "backward", "failed_step": 5, "generation": 1}
    assert {key: event[key] for key in wanted} == wanted
    assert event["step"] in (2, 4)  # the save of step 4 may not have been published yet
    assert [resumed["step"] for resumed in events(killed, "resume")] == [event["step"]]
    assert event["seconds_teardown"] < 5  # the other rank did not wait for its collective to time out
    [recovered] = events(killed, "recovered")
    parts = sum(value for key, value in recovered.items() if key.startswith("seconds_") and key != "seconds_in_all")
    assert recovered["cause"] == "worker" and abs(parts - recovered["seconds_in_all"]) < 0.1
    struck = [json.loads(line) for line in (killed / "faults.jsonl").read_text().splitlines()]
    assert [one["generation"] for one in struck if one["fault"] == KILL] == [0]
    assert committed_steps(killed)[-1] == 6
    assert_one_history(killed, undisturbed)


@pytest.mark.slow
def test_the_time_of_a_killed_run_is_accounted_for(killed: Path) -> None:
    first, last = events(killed, "accounting")  # at the restart, and at the end
    kinds = ("productive", "lost", "saving", "starting", "stopping", "evaluation")
    for told in (first, last):
        assert sum(Decimal(str(told[f"{kind}_seconds"])) for kind in kinds) == Decimal(str(told["wall_seconds"]))
    [launch], [restart], [end] = events(killed, "launch"), events(killed, "restart"), events(killed, "end")
    took = end["seconds"] - launch["seconds"] + launch["seconds_before"]
    assert last["wall_seconds"] == pytest.approx(took, abs=2e-3)
    assert (last["interruptions"], last["generations"], last["launches"]) == ({"worker": 1}, 2, 1)
    redone = sum(event["dropped_steps"] for event in events(killed, "rewind"))
    assert first["lost_steps"] == last["lost_steps"] == redone == 4 - restart["step"]
    assert (first["steps"], last["steps"]) == (restart["step"], 6)
    assert min(last[f"{kind}_seconds"] for kind in kinds[:-1]) > 0 and last["evaluation_seconds"] == 0
    [recovered] = events(killed, "recovered")
    start_up = recovered["seconds_in_all"] + restart["seconds_detection"]
    assert last["mean_seconds_to_recover"] >= start_up - 0.1  # to the first step, not to the loaded state


@pytest.mark.slow
def test_a_slow_rank_is_named(killed: Path) -> None:
    slow = events(killed, "straggler")
    assert slow and {(one["rank"], one["phase"], one["ended"]) for one in slow} == {(1, "forward", False)}
    assert slow[0]["step"] == 3 and slow[0]["ratio"] > 1.5 and slow[0]["host"]
    worst = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [one["slowest_rank"] for one in worst] == [1] * len(worst)


@pytest.mark.slow
def test_a_mistake_in_the_start_is_told_whole_and_not_tried_again(config: Path, tmp_path: Path) -> None:
    done = train(config, tmp_path / "run", "faults.inject=raise@rank=1,phase=start")
    assert done.returncode == 1
    assert "DrillError: asked for by faults.inject = 'raise@rank=1,phase=start'" in done.stderr
    assert "Traceback" in done.stderr and "in _watch" in done.stderr
    [failure] = events(tmp_path / "run", "failure")
    assert (failure["cause"], failure["exception"], failure["rank"]) == ("user_error", "DrillError", 1)
    assert events(tmp_path / "run", "restart") == []
