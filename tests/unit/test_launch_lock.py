"""A run's folder has one driver at a time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import lock
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


NO_LOCKS = "import errno, fcntl\ndef none(*a): raise OSError(errno.%s, 'no locks')\nfcntl.flock = none\n"


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_file_locks_a_lease_keeps_the_second_driver_out(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def none(*arguments: object) -> None:
        raise OSError(getattr(errno, error), "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    run, said = tmp_path / "run", list[str]()
    holder = subprocess.Popen(
        [sys.executable, "-c", NO_LOCKS % error + HOLD, str(run)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert "cannot lock files" in holder.stdout.readline() and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(ConfigError, match=rf"by process {holder.pid} on .*counts for 60 s"), only_driver(run):
            pass
        assert problem(run) is None
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(ConfigError, match=rf"by process {holder.pid} on"), only_driver(run, said.append):
            pass
    finally:
        holder.kill()
        holder.wait()
    with pytest.raises(ConfigError, match="counts for"), only_driver(run):
        pass  # nobody can see from another machine that it has died
    lease = run / lock.Lease.NAME
    old = lease.stat().st_mtime - 61
    os.utime(lease, (old, old))
    with only_driver(run, said.append):
        assert json.loads(lease.read_text())["process"] == os.getpid()
    assert not lease.exists() and len([line for line in said if "cannot lock files" in line]) == 2


def test_on_the_same_machine_the_lease_of_a_dead_process_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with lock.Lease(tmp_path, said.append) as held:
        pass
    (tmp_path / lock.Lease.NAME).write_text(json.dumps({**held.own, "process": dead.pid, "key": "x"}))
    monkeypatch.setattr(lock, "RENEW_S", 0.01)
    with lock.Lease(tmp_path, said.append) as mine:
        first = (tmp_path / lock.Lease.NAME).stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while (tmp_path / lock.Lease.NAME).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline, "the lease is not renewed"
            time.sleep(0.01)
        (tmp_path / lock.Lease.NAME).write_text(json.dumps({**mine.own, "process": 7, "host": "h", "key": "y"}))
        while not said:
            assert time.monotonic() < deadline, "it is not told that the lease was taken away"
            time.sleep(0.01)
    assert "was taken over by process 7 on h" in said[0]
    assert (tmp_path / lock.Lease.NAME).exists(), "another one's lease stays"
    assert [path.name for path in tmp_path.iterdir()] == [lock.Lease.NAME]
