"""Ranks that stop answering: the monitors name the one that holds the others up, and the run goes on without it."""

import json
from pathlib import Path

import pytest

from cluster import local
from cluster.config import ClusterConfig
from tests.faults.conftest import assert_one_history, events, train


def test_the_launcher_reports_a_hang_and_the_rank_that_hung(tmp_path: Path) -> None:
    spec = ClusterConfig(workers=2, threads_per_worker=1, limit_step_s=1.0, failure_grace_s=5.0)
    result = local.run("tests.ray.entries:stay", {"folder": str(tmp_path)}, spec, log_dir=tmp_path)
    assert result.exit_code == 1
    [failure] = result.failures
    assert (failure.rank, failure.kind, failure.signal) == (1, "hang", None)
    assert "hangs in section data, step 3" in failure.message
    assert "in stay" in (tmp_path / "rank-1.stacks").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "section", "seen"),
    [
        ("stop@rank=1,step=3,phase=exchange", "exchange", "rank 1: stopped"),
        ("hang@rank=1,step=3,phase=data", "data", "drills.py"),
    ],
)
def test_a_rank_that_hangs_is_found_and_leaves_no_trace_in_the_history(
    config: Path, undisturbed: Path, tmp_path: Path, fault: str, section: str, seen: str
) -> None:
    run = tmp_path / "run"
    done = train(config, run, f"faults.inject={fault}", "cluster.limit_step_s=6")
    assert done.returncode == 0, done.stdout + done.stderr
    [event] = events(run, "restart")
    wanted = {"cause": "hang", "rank": 1, "signal": None, "section": section, "failed_step": 3, "generation": 1}
    assert {key: event[key] for key in wanted} == wanted
    assert f"hangs in section {section}, step 3" in event["message"] and seen in event["message"]
    assert "rank 0: waits for other ranks" in event["message"]
    [struck] = [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]
    assert struck["fault"] == fault
    assert "communicator.py" in (run / "logs" / "rank-0.stacks").read_text()
    assert_one_history(run, undisturbed)
