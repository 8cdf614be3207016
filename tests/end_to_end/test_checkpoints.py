"""Checkpoints and the guard through the command line: listed, deleted, and a run that cannot go on says why."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import events, metrics

QUICK = ("--launcher", "debug", "--no-summary")


def steps(run: Path) -> list[int]:
    """Of the committed checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/COMMIT"))


@pytest.fixture
def trained(trimtab, config: Path, tmp_path: Path) -> Path:
    """A run that was saved at each of its six steps and keeps two and every second."""
    done = trimtab(
        "train", config, "checkpoint.every_steps=1", "checkpoint.keep=2", "checkpoint.keep_every_steps=2", *QUICK,
        "--run", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_list_and_prune(trimtab, trained: Path) -> None:
    assert steps(trained) == [2, 4, 5, 6]
    victim = trained / "checkpoints" / "step-00000006" / "manifest.json"
    victim.write_text(victim.read_text() + " ")
    (trained / "checkpoints" / ".step-00000009.tmp").mkdir()
    listed = trimtab("checkpoint", "list", trained, "--json")
    assert listed.returncode == 0, listed.stderr
    said = json.loads(listed.stdout)
    assert [one["step"] for one in said["checkpoints"]] == [2, 4, 5, 6]
    assert [one.get("world_size") for one in said["checkpoints"]] == [1, 1, 1, None]
    assert "step        6  NOT READABLE: " in listed.stderr and "does not match COMMIT" in listed.stderr
    assert said["drafts"] == [".step-00000009.tmp"]

    dry = trimtab("checkpoint", "prune", trained, "--keep", 1, "--keep-every", 0, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.count("would delete") == 3
    assert steps(trained) == [2, 4, 5, 6]
    done = trimtab("checkpoint", "prune", trained, "--keep", 1, "--keep-every", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert steps(trained) == [4, 5, 6], "the newest that can be read stays, and the damaged one is left to people"
    said = json.loads(done.stdout.splitlines()[-1])
    assert [len(said[key]) for key in ("deleted", "drafts", "damaged")] == [1, 1, 1]
    refused = trimtab("checkpoint", "prune", trained, "--keep", 0)
    assert refused.returncode == 2 and "--keep = 0" in refused.stderr


def test_nan_that_does_not_end_stops_with_a_status(trimtab, config: Path, tmp_path: Path) -> None:
    done = trimtab(
        "train", config, "parallel.virtual_ranks=2", "faults.inject=nan@rank=1,times=0", "guard.max_skips=3",
        "cluster.restarts=0", *QUICK, "--run", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1
    assert "for the 3rd step in a row" in done.stdout + done.stderr
    skips = [event for event in events(tmp_path / "run") if event["kind"] == "skip"]
    assert [skip["step"] for skip in skips] == [1, 2, 3]
    assert all(skip["rank"] == 1 and skip["expert"] is not None and skip["samples"] for skip in skips)


LIMITED = """
import resource, sys
from launch.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # as a full disk: no file grows beyond
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_large_file(trimtab, trained: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(LIMITED)
    before = steps(trained)
    done = trimtab(
        "train", config, "train.steps=9", "checkpoint.every_steps=1", "checkpoint.max_failed_saves=2", *QUICK,
        "cluster.restarts=0", "--run", trained, command=[sys.executable, str(tmp_path / "limited.py")],
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 saves in a row have failed" in done.stdout + done.stderr
    assert "File too large" in done.stdout + done.stderr
    assert steps(trained) == before
    assert len(metrics(trained)) >= 8, "training went on after the first failure"
    assert trimtab("checkpoint", "verify", trained).returncode == 0
