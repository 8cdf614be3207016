"""A run's folder has one driver at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import ConfigError
from launch.lock import only_driver
from launch.runfolder import problem

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys; from pathlib import Path; from launch.lock import only_driver\n" \
       "with only_driver(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip


def test_a_second_driver_is_refused_and_the_first_ones_death_frees(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being trained into by process {holder.pid} on"), only_driver(run):
        pass
    holder.kill()
    holder.wait()
    with only_driver(run):
        assert problem(run) is None, "the lock's file does not make it a folder that is not a run"
    with only_driver(run):
        pass
