"""The Ray launcher on a local cluster: results, failures, stops, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.process import is_alive

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
ENTRIES = "tests.ray.entries"


class Driver:
    """A launching process and what it said."""

    def __init__(self, cluster, name, payload, log_dir, workers=2, options=None, environment=None, **spec):
        settings = {"workers": workers, "failure_grace_s": 1.0, "threads_per_worker": 1, **spec}
        argument = json.dumps([f"{ENTRIES}:{name}", payload, settings, str(log_dir), str(ROOT), options or {}])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.drive", argument],
            cwd=ROOT,
            env={**os.environ, **cluster.environment(), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout_s=60):
        self.output, self.errors = self.process.communicate(timeout=timeout_s)
        assert self.output, self.errors
        self.code, self.results, self.error, self.kinds, self.seconds = json.loads(self.output.splitlines()[-1])
        assert self.process.returncode == self.code
        return self


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pids(folder, count=2):
    wait_for(lambda: len([p for p in folder.glob("pid-*") if p.read_text()]) == count)
    return [int((folder / f"pid-{rank}").read_text()) for rank in range(count)]


def test_every_rank_knows_its_place_and_keeps_its_output(ray_cluster, tmp_path):
    environment = {"PMIX_RANK": "5", "SLURM_PROCID": "5"}
    run = Driver(ray_cluster, "describe", {}, tmp_path, environment=environment).finish()
    assert (run.code, run.error) == (0, "")
    for rank, answer in enumerate(run.results):
        assert (answer["rank"], answer["local_rank"], answer["world_size"]) == (rank, rank, 2)
        assert (answer["node_rank"], answer["n_nodes"], answer["launcher"]) == (0, 1, "ray")
        assert answer["init_method"].startswith("tcp://127.0.0.1:") and not answer["torch_loaded"]
        assert answer["environment"]["RANK"] == str(rank)
        assert answer["environment"]["OMP_NUM_THREADS"] == "1"
        assert answer["environment"]["PMIX_RANK"] is None and answer["environment"]["SLURM_PROCID"] is None
        log = (tmp_path / f"rank-{rank}.log").read_text()
        assert f"rank {rank} is here\n" in log and "a word to standard error\n" in log
    assert "rank 0 is here" in run.output and "rank 1 is here" not in run.output
    assert not any(is_alive(answer["pid"]) for answer in run.results)


def test_a_gloo_group_forms(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "reduce", {}, tmp_path).finish()
    assert run.error == ""
    assert run.results == [{"total": [3.0] * 4, "threads": 1}] * 2


def test_one_rank_fails_and_all_are_gone_within_seconds(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "fail", {"rank": 1, "others": 100}, tmp_path).finish()
    assert run.code == 1 and run.kinds == [[1, "exception"]] and run.seconds < 20
    assert "ValueError: rank 1 was told to fail" in run.error
    assert "ValueError" in (tmp_path / "rank-1.log").read_text()


def test_a_killed_rank_is_the_cause_and_its_last_words_are_kept(ray_cluster, tmp_path):
    (tmp_path / "pids").mkdir()
    run = Driver(ray_cluster, "die", {"rank": 1, "pids": str(tmp_path / "pids")}, tmp_path).finish()
    assert run.code == 1 and run.kinds[0] == [1, "killed"]
    assert "ActorDiedError" in run.error and "last words" in run.error
    assert not any(is_alive(pid) for pid in pids(tmp_path / "pids"))


def test_a_rank_that_hangs_is_killed_by_its_monitor_and_named(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "stay", {"folder": str(tmp_path)}, tmp_path, limit_step_s=1.0).finish()
    assert run.code == 1 and run.kinds == [[1, "hang"]]
    assert "hangs in section data, step 3" in run.error
    assert "in stay" in (tmp_path / "rank-1.stacks").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_gracefully(ray_cluster, tmp_path, number):
    (tmp_path / "pids").mkdir()
    run = Driver(ray_cluster, "work_until_stopped", {"pids": str(tmp_path / "pids"), "saving": 0.5}, tmp_path)
    ranks = pids(tmp_path / "pids")
    run.process.send_signal(number)
    run.finish()
    assert run.code == 75 and [result["status"] for result in run.results] == ["stopped"] * 2
    assert "rank 0 has saved" in run.output
    assert not any(is_alive(pid) for pid in ranks)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(ray_cluster, tmp_path):
    (tmp_path / "pids").mkdir()
    payload = {"pids": str(tmp_path / "pids"), "seconds": 100}
    run = Driver(ray_cluster, "ignore_stop", payload, tmp_path, stop_grace_s=1.0)
    ranks = pids(tmp_path / "pids")
    run.process.terminate()
    run.finish(30)
    assert run.code == 1 and "did not stop within 1 s" in run.error
    assert not any(is_alive(pid) for pid in ranks)


def test_actors_die_with_a_driver_that_is_killed(ray_cluster, tmp_path):
    (tmp_path / "pids").mkdir()
    run = Driver(ray_cluster, "ignore_stop", {"pids": str(tmp_path / "pids"), "seconds": 100}, tmp_path)
    ranks = pids(tmp_path / "pids")
    run.process.kill()
    run.process.communicate()
    wait_for(lambda: not any(is_alive(pid) for pid in ranks), seconds=10)


def test_more_workers_than_the_cluster_can_place_are_refused(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "echo", {}, tmp_path, workers=3).finish()
    assert run.code == 2 and run.seconds < 5
    assert run.error.startswith(
        "cluster.workers = 3 (1 CPU each) is more than the Ray cluster can place: it has room for 2"
    )
    assert "node 1: 2 CPU" in run.error


def test_a_wait_that_runs_out_says_for_what(ray_cluster, tmp_path):
    (tmp_path / "pids").mkdir()
    first = Driver(ray_cluster, "work_until_stopped", {"pids": str(tmp_path / "pids")}, tmp_path)
    pids(tmp_path / "pids")  # both places are taken now
    second = Driver(ray_cluster, "echo", {}, tmp_path / "second", start_timeout_s=4.0).finish()
    assert second.code == 1 and second.kinds == [], "no rank has failed"
    assert "waited 4 s for room for 2 workers: 0 of 2 workers now" in second.error and "free are 0 CPU" in second.error
    assert "cluster.capacity_wait_s=" in second.error
    assert "ray: pending, room for 0 of 2 workers now" in second.output and "others use the rest" in second.output
    waiting = Driver(ray_cluster, "echo", {}, tmp_path / "third")
    assert "ray: pending" in waiting.process.stdout.readline()
    waiting.process.terminate()
    waiting.finish()
    assert waiting.code == 1 and waiting.error.startswith("stopped on request after"), waiting.error
    queued = Driver(ray_cluster, "echo", {}, tmp_path / "fourth")
    assert "ray: pending" in queued.process.stdout.readline()
    first.process.terminate()
    assert first.finish().code == 75
    assert queued.finish().code == 0, "it got its turn"


def test_a_folder_that_a_node_does_not_see_is_refused_before_anything_starts(ray_cluster, tmp_path):
    run = Driver(
        ray_cluster, "echo", {}, tmp_path, options={"blind": True, "shared": [str(tmp_path / "ckpt")]}
    ).finish()
    assert run.code == 2 and run.kinds == []
    assert f"does not see {tmp_path / 'ckpt'}: the driver on" in run.error and "storage that all nodes see" in run.error
    seen = Driver(ray_cluster, "echo", {}, tmp_path, options={"shared": [str(tmp_path / "ckpt")]}).finish()
    assert seen.code == 0 and list((tmp_path / "ckpt").iterdir()) == [], "the proof is gone"


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1"])
def test_an_address_of_another_kind_is_refused(ray_cluster, tmp_path, address):
    run = Driver(ray_cluster, "echo", {}, tmp_path, environment={"RAY_ADDRESS": address}).finish()
    assert run.code == 2 and f"RAY_ADDRESS = {address}" in run.error and "RAY_ADDRESS=127.0.0.1:6379" in run.error


def test_a_cluster_of_another_version_is_refused_with_both(ray_cluster, tmp_path):
    """Ray's own check is told that the cluster runs another version than it does."""
    run = Driver(ray_cluster, "echo", {}, tmp_path, options={"ray_version": "2.55.1"}).finish()
    assert run.code == 2 and run.kinds == []
    assert "runs Ray 2.55.1 on Python" in run.error and "install ray==2.55.1 here" in run.error


def test_output_comes_home_from_nodes_that_do_not_see_the_log_folder(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "describe", {}, tmp_path, options={"blind": True}).finish()
    assert run.code == 0
    for rank in range(2):
        assert f"rank {rank} is here\n" in (tmp_path / f"rank-{rank}.log").read_text()
    assert "rank 0 is here" in run.output


def test_the_cause_names_the_log_on_a_node_that_does_not_see_the_log_folder(ray_cluster, tmp_path):
    run = Driver(ray_cluster, "die", {"rank": 1}, tmp_path, options={"blind": True}).finish()
    assert run.kinds[0] == [1, "killed"]
    left = Path(run.error.split("may hold more of it in ")[1].split()[0])
    assert "last words" in left.read_text()
    for path in left.parent.glob("trimtab-rank-*.log"):
        if path.stat().st_mtime >= tmp_path.stat().st_mtime:
            path.unlink()


def test_a_cluster_that_is_not_there_is_reported_at_once(ray_cluster, tmp_path):
    began = time.monotonic()
    run = Driver(ray_cluster, "echo", {}, tmp_path, environment={"RAY_ADDRESS": "127.0.0.1:9"}).finish()
    assert run.code == 1 and "no Ray cluster answers at 127.0.0.1:9" in run.error
    assert time.monotonic() - began < 15


def test_a_driver_without_the_token_gets_nothing(ray_cluster, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    wrong_token = {"RAY_AUTH_TOKEN_PATH": str(wrong), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    run = Driver(ray_cluster, "echo", {}, tmp_path, environment=wrong_token).finish()
    assert run.code == 1 and "refused the token" in run.error
