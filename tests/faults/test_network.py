"""Three machines in network namespaces: the cable of one is pulled in the middle of a run, and plugged in again."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.process import descendants
from tests.faults import namespaces
from tests.faults.conftest import ROOT, assert_one_history, events
from tests.faults.namespaces import Namespaces
from tests.faults.ray_drill import QUICK

PORT = 6399
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


class Cluster:
    """Ray on three machines: the head holds no ranks, each other one."""

    def __init__(self, machines: Namespaces, folder: Path) -> None:
        self.machines, self.folder = machines, folder
        self.processes: dict[int, subprocess.Popen] = {}
        self.environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"{machines.address(0)}:{PORT}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, number: int) -> None:
        """Starts a machine's Ray."""
        words = [*RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address", self.machines.address(number)]
        words += ["--object-store-memory", str(80 * 1024 * 1024), "--num-cpus", str(int(number > 0))]
        if number == 0:
            words += [
                "--head",
                "--port",
                str(PORT),
                "--include-dashboard",
                "false",
                "--system-config",
                json.dumps(QUICK),
            ]
            words += ["--temp-dir", str(self.folder)]
        else:
            words += ["--address", self.environment["RAY_ADDRESS"]]
        environment = {name: value for name, value in self.environment.items() if number == 0 or name != "RAY_ADDRESS"}
        environment.pop("RAY_ADDRESS", None)
        with open(self.folder / f"ray-{number}.log", "ab") as log:
            self.processes[number] = self.machines.start(number, words, environment, log)

    def wait_until_reachable(self, seconds: float = 120.0) -> None:
        """Returns when the head takes connections from another machine."""
        knock = f"import socket; socket.create_connection(('{self.machines.address(0)}', {PORT}), 2)"
        deadline = time.monotonic() + seconds
        while self.machines.run(1, [sys.executable, "-S", "-c", knock]).returncode:
            assert self.processes[0].poll() is None, (self.folder / "ray-0.log").read_text()
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(0.5)

    def wait_until_started(self, number: int, seconds: float = 120.0) -> None:
        """Returns when a machine's Ray says that it has started."""
        log = self.folder / f"ray-{number}.log"
        deadline = time.monotonic() + seconds
        while "Ray runtime started" not in log.read_text():
            assert self.processes[number].poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"machine {number} has not started: {log.read_text()}"
            time.sleep(0.2)

    def end(self, number: int) -> None:
        """Ends it, whatever it is doing."""
        process = self.processes.pop(number)
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_until(
    what: str, process: subprocess.Popen, said: Path, true: Callable[[], bool], seconds: float = 150.0
) -> None:
    """Waits for something while the run goes on. said: the run's output."""
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, f"the run ended before {what}: {said.read_text()}"
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.drill
def test_a_cable_is_pulled_and_plugged_in_again(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    why_not = namespaces.problem()
    if why_not:
        pytest.skip(why_not)
    run, folder = tmp_path / "run", Path("/tmp") / f"ttn-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o700)  # names of sockets have to be short
    words = [sys.executable, "-m", "launch", "train", str(config), "cluster.nodes=2", "cluster.min_workers=2"]
    words += ["cluster.wait_for_nodes_s=240", "cluster.limit_step_s=30", "faults.inject=slow@rank=0,seconds=1,times=0"]
    words += ["cluster.capacity_wait_s=120", "cluster.start_timeout_s=180"]
    words += ["--launcher", "ray", "--run", str(run), "--no-summary"]
    with Namespaces(3) as machines:
        cluster = Cluster(machines, folder)
        driver = None
        try:
            cluster.start(0)
            cluster.wait_until_reachable()
            for number in (1, 2):  # one after the other: their Rays share this machine's folder of the session
                cluster.start(number)
                cluster.wait_until_started(number)
            said = folder / "driver.log"
            with open(said, "wb") as log:
                driver = machines.start(0, words, cluster.environment, log)
            metrics = run / "metrics.jsonl"
            wait_until("step 3", driver, said, lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
            machines.link(2, "down")
            cut_at = time.monotonic()
            wait_until("the end of the generation", driver, said, lambda: "starting again" in said.read_text())
            noticed = time.monotonic() - cut_at
            time.sleep(1.0)
            assert driver.poll() is None and not events(run, "restart"), "with one machine it waits for the other"
            cluster.end(2)  # as an init system does when its Ray has left the cluster
            machines.link(2, "up")
            cluster.start(2)
            driver.wait(timeout=240)
            output = said.read_text()
        finally:
            if driver is not None and driver.poll() is None:
                driver.kill()
            for number in list(cluster.processes):
                cluster.end(number)
            shutil.rmtree(folder, ignore_errors=True)
    assert driver.returncode == 0, output
    [restart] = events(run, "restart")
    print(
        f"noticed {noticed:.1f} s after the cable was pulled: {restart['cause']}, waited {restart['seconds_waiting']} s"
    )
    assert restart["cause"] in ("node", "hang", "worker") and restart["workers"] == 2
    assert {started["world_size"] for started in events(run, "start")} == {2}
    assert_one_history(run, undisturbed)
