"""Three Ray nodes, one killed hard in the middle of a run, which goes on with the third as if nothing had been."""

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.process import descendants
from tests.faults.conftest import ROOT, assert_one_history, events


def drill(module: str, argument: str) -> tuple[dict, str]:
    """Runs a module of this folder; what it told, and its whole output."""
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.faults.{module}", argument], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=200)
    finally:
        started = [process.pid, *descendants(process.pid)] if process.poll() is None else []
        for pid in started:  # Ray's processes would outlive their driver
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, out + error
    return json.loads(out.splitlines()[-1]), out + error


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_node_is_replaced_by_the_third(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slowly = "faults.inject=slow@rank=0,seconds=1,times=0"
    arguments = ["train", str(config), "cluster.nodes=2", slowly]
    arguments += ["--launcher", "ray", "--run", str(run), "--no-summary"]
    told, output = drill("ray_drill", json.dumps([arguments, str(run), 3]))
    assert told["status"] == 0, output
    assert told["nodes_before"] == 3
    [event] = [one for one in events(run, "restart") if one["cause"] == "node"]
    assert (event["node"], event["workers"]) == (told["killed"], 2)
    assert event["failed_step"] <= 6 and event["seconds_teardown"] < 10
    assert {started["world_size"] for started in events(run, "start")} == {2}
    assert_one_history(run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_nodes_that_fail_twice_go_or_come_back(tmp_path: Path) -> None:
    told, output = drill("ray_pool_drill", str(tmp_path))

    twice = told["avoid"]
    assert (twice["status"], twice["restarts"]) == (0, [["worker", 3], ["worker", 2]]), output
    assert twice["victim"] in twice["nodes"][1] and twice["victim"] not in twice["nodes"][2]

    lost = told["shrink"]
    assert (lost["status"], lost["restarts"]) == (0, [["node", 2], ["more workers", 3]]), output
    assert [len(nodes) for nodes in lost["nodes"]] == [3, 2, 3]
    assert lost["victim"] not in lost["nodes"][1]

    drained = told["drain"]
    assert (drained["status"], drained["restarts"]) == (0, [["preemption", 2]]), output
    assert drained["victim"] in drained["nodes"][0] and drained["victim"] not in drained["nodes"][1]
