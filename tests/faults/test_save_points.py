"""Killed at each point of a save: a readable checkpoint is always there, drafts are cleared away, nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.faults import SAVE_POINTS
from parallel.checkpoint import committed, damaged_files, open_checkpoint
from parallel.remote import RemotePath
from tests import object_store
from tests.faults.conftest import ROOT, assert_one_history, events

POINTS = {
    # point: steps of the checkpoints that must be there, readable, when a rank is killed there in the save of step 4
    "before_write": [2],
    "mid_write": [2],
    "before_commit": [2],
    "before_rename": [2],
    "cleanup": [2, 4],
}
# At an address COMMIT is the last thing that is written, and what was killed before that keeps its name.
REMOTE = {"mid_write": [2], "before_commit": [2], "before_rename": [2, 4]}


def objects(folder: Path) -> Path:
    """Where the object store keeps its objects."""
    path = folder / "objects"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each point, killed there and then taken up again, and one that was not disturbed.

    All of them are forks of one process, so that torch is imported once.
    """
    folder = tmp_path_factory.mktemp("points")
    remote = [f"objects:{point}" for point in REMOTE]
    environment = {"OBJECT_STORE": str(objects(folder)), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.forks", str(config), str(folder), *POINTS, *remote],
        cwd=ROOT, env={**os.environ, **environment}, text=True, timeout=240, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_point_is_tried() -> None:
    assert tuple(POINTS) == SAVE_POINTS


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point: str, runs: Path) -> None:
    told = json.loads((runs / f"{point}.json").read_text())
    assert told["statuses"] == [-9, 0]  # killed, then done
    assert told["readable"] == POINTS[point]
    assert bool(told["drafts"]) == (point != "cleanup")
    run = runs / point
    assert [event["step"] for event in events(run, "resume")] == [POINTS[point][-1]]
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    for path in committed(run / "checkpoints"):
        assert damaged_files(open_checkpoint(path)) == []
    assert_one_history(run, runs / "undisturbed")


@pytest.mark.parametrize("point", REMOTE)
def test_killed_at_without_renaming(point: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads((runs / f"objects:{point}.json").read_text())
    assert told["statuses"] == [-9, 0]
    assert told["readable"] == REMOTE[point]
    assert told["drafts"] == ([] if point == "before_rename" else ["step-00000004"])
    run = runs / f"objects:{point}"
    assert [event["step"] for event in events(run, "resume")] == [REMOTE[point][-1]]
    again = "step-00000004" if point == "before_rename" else "step-00000004.1"
    assert told["left"] == [again, "step-00000006"]
    object_store.register()
    monkeypatch.setenv("OBJECT_STORE", str(objects(runs)))
    root = RemotePath(f"objects://bucket/{point}", 20.0)
    assert not list((run / "checkpoints").iterdir())
    assert_one_history(run, runs / "undisturbed", checkpoints=root)
