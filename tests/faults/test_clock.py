"""The wall clock of a rank jumps by an hour, back and forth: nothing that decides looks at it."""

import itertools
from datetime import datetime
from pathlib import Path

import pytest

from tests.faults.conftest import assert_one_history, committed_steps, events, train

JUMPS = (
    "clock@rank=0,step=2,seconds=3600",
    "clock@rank=1,step=2,seconds=-3600,phase=data",
    "clock@rank=0,step=4,seconds=-7200",
    "clock@rank=0,step=4,seconds=-60,phase=save",
    "kill@rank=1,step=5,phase=backward",
)


@pytest.mark.slow
def test_an_hour_forward_and_two_back(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limits = ("cluster.limit_start_s=120", "cluster.limit_step_s=60", "cluster.limit_save_s=60")  # all below an hour
    done = train(config, run, f"faults.inject={';'.join(JUMPS)}", "checkpoint.keep=1", *limits)
    assert done.returncode == 0, done.stdout + done.stderr
    [restart] = events(run, "restart")
    assert (restart["cause"], restart["rank"], restart["signal"], restart["failed_step"]) == ("worker", 1, 9, 5)
    assert restart["step"] in (2, 4) and [event["step"] for event in events(run, "resume")] == [restart["step"]]
    assert not list((run / "logs").glob("rank-*.hang")) and not events(run, "failure")
    assert committed_steps(run) == [6]  # the newest by step, of checkpoints from three different hours
    times = [datetime.fromisoformat(event["time"]) for event in events(run)]
    steps = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    assert max(steps) > 3000 and min(steps) < -3000, "the clock did jump"
    assert all(event["seconds"] >= 0 for event in events(run))
    assert_one_history(run, undisturbed)
