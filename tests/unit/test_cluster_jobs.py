"""The wrapper of a submitted command, and what is shown of its log."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.config import ClusterConfig
from cluster.job_main import exit_line, find_exit_code
from cluster.jobs import _Keeper
from cluster.ray_capacity import capacity_problem


def wrapped(*command, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.job_main", *command], stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_the_status_is_passed_on_and_noted(code):
    job = wrapped(sys.executable, "-c", f"print('hello'); raise SystemExit({code})")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == code
    assert output == f"hello\n{exit_line(code)}\n" and find_exit_code(output) == code


def test_a_command_that_was_killed_is_noted():
    job = wrapped(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    assert find_exit_code(job.communicate(timeout=20)[0]) == 137


def test_the_wrapper_outlives_a_stop_of_the_whole_group():
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    job = wrapped(sys.executable, "-c", program, start_new_session=True)
    assert job.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert output == f"saved\n{exit_line(75)}\n" and job.returncode == 75


def test_only_a_whole_line_of_that_form_counts():
    assert find_exit_code("") is None
    assert find_exit_code("see 'trimtab job: exit status 3'\n") is None
    assert find_exit_code(f"{exit_line(1)}\nmore\n{exit_line(75)}\n") == 75


def test_the_log_is_shown_without_the_line_for_machines():
    shown = []
    keep = _Keeper(shown.append)
    log = f"step 1\nstep 2\nlast words\n{exit_line(75)}\n"
    for start, end in ((0, 10), (10, 14), (0, 30), (14, len(log)), (0, len(log))):  # overlapping, as after a reconnect
        keep.add(log[start:end], start)
    keep.finish()
    assert "".join(shown) == "step 1\nstep 2\nlast words\n" and keep.exit_code == 75


def test_an_unfinished_last_line_is_shown():
    shown = []
    keep = _Keeper(shown.append)
    keep.add("killed in the mid", 0)
    keep.finish()
    assert "".join(shown) == "killed in the mid\n" and keep.exit_code is None


NODE = {"CPU": 4.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("change", "nodes", "gpu", "fits"),
    [
        ({"workers": 4}, [NODE], False, True),
        ({"workers": 5}, [NODE], False, False),
        ({"workers": 8}, [NODE, NODE], False, True),
        ({"workers": 8, "nodes": 2}, [NODE, NODE], False, True),
        ({"workers": 6, "nodes": 2}, [{"CPU": 8.0}, {"CPU": 2.0}], False, False),
        ({"workers": 2, "cpus_per_worker": 3}, [NODE, NODE], False, True),
        ({"workers": 3, "cpus_per_worker": 3}, [NODE, NODE], False, False),
        ({"workers": 2}, [{"CPU": 8.0, "GPU": 2.0}], True, True),
        ({"workers": 4}, [{"CPU": 8.0, "GPU": 2.0}], True, False),
    ],
)
def test_capacity(change, nodes, gpu, fits):
    problem = capacity_problem(ClusterConfig(**change), nodes, gpu)
    assert (problem is None) == fits
    if problem:
        assert problem.startswith("cluster.") and "node 1:" in problem and "add nodes" in problem
