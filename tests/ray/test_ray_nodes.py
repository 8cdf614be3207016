"""Two Ray nodes on this machine: equal shares, ranks ordered by node, a rendezvous over the network's own interface."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ports import interface_of, own_address

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from cluster import ray_actors
from cluster.config import ClusterConfig

node = {"num_cpus": 3, "object_store_memory": 80 * 1024 * 1024, "include_log_monitor": False}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
os.environ["RAY_ADDRESS"] = cluster.address
answers = []
try:
    for name, spec in json.loads(sys.argv[2]):
        result = ray_actors.run(
            f"tests.ray.entries:{name}", {}, ClusterConfig(threads_per_worker=1, **spec), ep_size=2,
            log_dir=Path(sys.argv[1]), code=Path(sys.argv[3]), folders=("cluster", "tests"),
            on_output=lambda text: None,
        )
        answers.append([result.exit_code, result.results, result.error])
finally:
    cluster.shutdown()
print(json.dumps(answers))
"""


def test_ranks_are_ordered_by_node_and_meet_over_the_network(tmp_path):
    runs = [("describe", {"workers": 4, "nodes": 2}), ("reduce", {"workers": 2, "nodes": 2}), ("echo", {"workers": 7})]
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(runs), str(ROOT)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr
    placed, reduced, refused = json.loads(run.stdout.splitlines()[-1])

    code, ranks, error = placed
    assert (code, error) == (0, "")
    assert [(r["node_rank"], r["local_rank"]) for r in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(r["n_nodes"], r["local_world_size"]) for r in ranks} == {(2, 2)}
    [address] = {r["init_method"] for r in ranks}
    assert address.startswith(f"tcp://{own_address()}:")
    assert {r["environment"]["GLOO_SOCKET_IFNAME"] for r in ranks} == {interface_of(own_address())}

    assert reduced == [0, [{"total": [3.0] * 4, "threads": 1}] * 2, ""]
    assert refused[0] == 2 and "has room for 6 (node 1: 3 CPU, 0 GPU; node 2: 3 CPU, 0 GPU)" in refused[2]
