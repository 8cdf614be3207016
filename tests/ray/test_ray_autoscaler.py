"""A cluster whose autoscaler starts nodes on demand, with Ray's provider of pretended nodes; none is there at first."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.process import descendants, end_processes, is_alive

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.drill]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
GCS_PORT = 6379  # the provider starts its nodes against this port of the machine's address
SCALING = {
    "cluster_name": "fake_multinode", "max_workers": 8, "provider": {"type": "fake_multinode"},
    "head_node_type": "ray.head.default", "upscaling_speed": 1.0, "idle_timeout_minutes": 10, "auth": {}, "docker": {},
    "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [],
    "rsync_filter": [],
    **{
        f"{name}_commands": []
        for name in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {
            "resources": {"CPU": 2, "object_store_memory": 100 * 2**20}, "node_config": {}, "min_workers": 0,
            "max_workers": 1,
        },
    },
}  # fmt: skip


def test_nodes_are_started_for_the_workers_that_are_asked_for(tmp_path: Path) -> None:
    import ray

    folder = Path(tempfile.mkdtemp(prefix="fa-", dir="/tmp"))
    (folder / "scale.yaml").write_text(json.dumps(SCALING))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(GCS_PORT), "--num-cpus", "0"]
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    command += ["--include-dashboard", "false", "--temp-dir", str(folder / "r"), "--disable-usage-stats"]
    command += ["--object-store-memory", str(80 * 2**20), f"--autoscaling-config={folder / 'scale.yaml'}"]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    everything: set[int] = set()
    try:
        deadline = time.monotonic() + 90
        while not (folder / "r" / "ray_current_cluster").exists():
            assert time.monotonic() < deadline and head.poll() is None, (tmp_path / "ray.log").read_text()
            time.sleep(0.2)
        environment["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{GCS_PORT}"
        answers = {}
        for name, workers, wait_s in (("refused", 2, 0.0), ("too many", 3, 15.0), ("grown", 2, 120.0)):
            spec = {"workers": workers, "threads_per_worker": 1, "capacity_wait_s": wait_s, "accelerator": "cpu"}
            argument = ["tests.ray.entries:echo", {}, spec, str(tmp_path / name), str(ROOT), {}]
            run = subprocess.run(
                [sys.executable, "-m", "tests.ray.drive", json.dumps(argument)],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
            )  # fmt: skip
            everything |= set(descendants(head.pid))
            assert run.stdout, run.stderr
            answers[name] = (*json.loads(run.stdout.splitlines()[-1]), run.stdout)
    finally:
        everything |= set(descendants(head.pid))
        head.send_signal(signal.SIGTERM)
        head.wait(30)
        end_processes(lambda: [pid for pid in everything if is_alive(pid)], grace_s=2.0)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    code, _, error, *_ = answers["refused"]
    assert code == 2 and "it has room for 0" in error
    code, _, error, *_ = answers["too many"]
    assert code == 2 and "The driver waited 15 s (cluster.capacity_wait_s)" in error
    assert "ray: pending, room for" in answers["too many"][-1]
    code, results, error, *_ = answers["grown"]
    assert (code, error) == (0, "") and [one["rank"] for one in results] == [0, 1]
