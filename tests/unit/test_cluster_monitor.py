"""The monitor beside a rank: limits, what it does not count, whom it kills, and that it ends with its rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.monitor import Monitor, hang_of, limit_of, new_watch
from cluster.places import WIDTH, parse_line, place_line
from cluster.process import is_alive

ROOT = Path(__file__).resolve().parents[2]

# A rank that says where it is, and then waits in a file named as one that waits for others, or elsewhere.
RANK = """
import json, os, sys, time
from pathlib import Path
from cluster.context import RankContext
from cluster.monitor import start_monitor
from cluster.places import place_line, section_file
watch, rank, world, name = json.loads(sys.argv[1])
monitor = start_monitor(watch, RankContext(rank, world, rank, world, 0, 1, ""))
section_file(Path(watch["folder"]), rank).write_bytes(place_line(0, "data", 3, time.time()))
print(monitor.pid if monitor else 0, flush=True)
exec(compile("def run_entry():\\n    time.sleep(60)\\nrun_entry()", name, "exec"))
"""


def ranks(folder: Path, names: list[str], **limits: float) -> tuple[dict, list[subprocess.Popen], list[int]]:
    watch = new_watch(ClusterConfig(**limits), folder)
    assert watch is not None
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps([watch, rank, len(names), name])],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    return watch, processes, [int(process.stdout.readline()) for process in processes if process.stdout]


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_the_line_of_a_rank_reads_as_it_was_written() -> None:
    line = place_line(2, "backward", 17, 12.5)
    assert len(line) == WIDTH == len(place_line(0, "start", None, time.time()))
    place = parse_line(line.decode(), 2)
    assert place and (place.section, place.step, place.seen_at) == ("backward", 17, 12.5)
    assert parse_line(line.decode(), 1) is None and parse_line("torn", 2) is None and parse_line("", 2) is None


def test_each_section_has_the_limit_of_its_kind() -> None:
    limits = {"start": 1.0, "step": 2.0, "save": 3.0}
    wanted = {"start": 1.0, "load": 1.0, "save": 3.0, "data": 2.0, "forward": 2.0, "backward": 2.0, "step": 2.0}
    assert {section: limit_of(section, limits) for section in wanted} == wanted


def test_a_section_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    watch = new_watch(ClusterConfig(limit_step_s=9.0, limit_exchange_s=2.0, limit_load_s=0.0), tmp_path)
    assert watch
    wanted = {"exchange": 2.0, "forward": 9.0, "data": 9.0, "step": 9.0, "load": 0.0, "start": 1800.0, "save": 2400.0}
    assert {section: limit_of(section, watch["limits"]) for section in wanted} == wanted


def test_without_limits_there_is_no_monitor(tmp_path: Path) -> None:
    assert new_watch(ClusterConfig(limit_start_s=0, limit_step_s=0, limit_save_s=0), tmp_path) is None
    assert hang_of(None, 0) == ""


def test_only_a_hang_of_this_launch_counts(tmp_path: Path) -> None:
    mine, other = new_watch(ClusterConfig(), tmp_path), new_watch(ClusterConfig(), tmp_path)
    assert mine and other
    (tmp_path / "rank-1.hang").write_text(json.dumps({"launch": mine["launch"], "message": "hangs"}))
    assert (hang_of(mine, 1), hang_of(mine, 0), hang_of(other, 1)) == ("hangs", "", "")
    (tmp_path / "rank-1.hang").write_text("to")
    assert hang_of(mine, 1) == ""


def test_time_counts_from_the_last_mark_and_not_while_the_machine_slept(tmp_path: Path) -> None:
    watch = new_watch(ClusterConfig(limit_step_s=5.0), tmp_path)
    assert watch
    file, old = tmp_path / "rank-0.at", place_line(0, "data", 9, 1.0)
    file.write_bytes(old)  # left by an earlier run of this folder
    spec = {**watch, "rank": 0, "world_size": 1, "generation": 0, "pid": os.getpid(), "before": old.decode()}
    monitor = Monitor(spec)

    def pass_by(seconds: float) -> None:
        monitor._looked_at -= seconds
        monitor._update()

    for _ in range(4):
        pass_by(1.9)
    assert not monitor._look().is_over  # this process has not said anything yet
    file.write_bytes(place_line(0, "data", 1, 2.0))
    pass_by(1.9)
    assert monitor.seconds == 0.0
    pass_by(3600.0)
    assert not monitor._look().is_over
    for _ in range(2):
        pass_by(1.9)
    assert monitor._look().is_over
    file.write_bytes(place_line(0, "save", 1, 3.0))
    pass_by(1.9)
    assert not monitor._look().is_over


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stopped", [False, True])
def test_the_rank_that_others_wait_for_is_killed_and_no_other(tmp_path: Path, stopped: bool) -> None:
    names = ["/t/communicator.py", "/t/communicator.py" if stopped else "/t/reader.py"]
    watch, processes, _ = ranks(tmp_path, names, limit_step_s=0.8)
    try:
        if stopped:
            processes[1].send_signal(signal.SIGSTOP)
        assert processes[1].wait(timeout=20) == -signal.SIGKILL
        why = hang_of(watch, 1)
        assert "hangs in section data, step 3" in why and "0.8 s is the limit" in why
        assert ("it does not answer" if stopped else "the other ranks wait for it") in why
        assert "rank 0: waits for other ranks" in why and ("rank 1: stopped" in why) == stopped
        assert "/t/communicator.py" in (tmp_path / "rank-0.stacks").read_text()
        assert processes[0].poll() is None and hang_of(watch, 0) == ""
    finally:
        end(processes)


def test_a_monitor_ends_with_its_rank(tmp_path: Path) -> None:
    _, processes, monitors = ranks(tmp_path, ["/t/reader.py"])
    assert all(is_alive(pid) for pid in monitors)
    end(processes)
    wait_for(lambda: not any(is_alive(pid) for pid in monitors))
