"""Nodes that come and go under a supervised made-up run on Ray: `python -m tests.faults.ray_pool_drill FOLDER`.

Three nodes of one CPU each. Prints, for each scenario, its status, the nodes of every generation, and its restarts.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from cluster import ray_actors
from cluster.config import ClusterConfig
from cluster.drain import announce, nodes_here
from cluster.ray_nodes import living_nodes
from cluster.ray_pool import RayPool
from cluster.staging import ROOMS
from launch.config import Config
from launch.preflight import Plan
from launch.supervise import largest_world, run_supervised
from tests.faults.conftest import ROOT, events
from tests.faults.ray_drill import NODE, QUICK

ONCE, WAIT = {"step": 0, "rank": 0, "do": ""}, {"step": 2, "rank": 0, "do": "wait"}


def supervised(run: Path, script: list[dict], workers: int, on_generation=lambda number: None) -> dict:
    """Runs the made-up training on Ray; returns what happened."""
    spec = ClusterConfig(
        workers=workers, backoff_s=0.0, failure_grace_s=0.5, threads_per_worker=1, wait_for_nodes_s=1.0,
        capacity_wait_s=20.0,
    )  # fmt: skip
    base = Config()
    train = replace(base.train, global_batch_size=12, micro_batch_size=2)  # for 1, 2 and 3 ranks
    config = replace(base, cluster=spec, train=train, parallel=replace(base.parallel, ep_size=1))
    plan = Plan(config, run, "ray", workers, "auto", (), "", False, ())
    run.mkdir(parents=True)
    pool = RayPool(spec, lambda limit: largest_world(config, limit), ROOT, (*ROOMS, "tests"))
    nodes: list[list[str]] = []

    def launch(generation, payload, signals):
        thread = threading.Thread(target=on_generation, args=(generation.number,), daemon=True)
        pool.in_use = set()
        thread.start()
        result = ray_actors.run(
            "tests.faults.entries:toy", payload, pool.shape(generation.workers), log_dir=run / "logs",
            generation=generation.number, stop=signals.stop, on_output=lambda text: None, pool=pool,
            leave=generation.leave,
        )  # fmt: skip
        nodes.append(sorted(pool.in_use))
        return result

    try:
        result = run_supervised(plan, {"run": str(run), "script": script, "commit": 1}, launch, lambda text: None, pool)
    finally:
        pool.connection.close()
    causes = [(event["cause"], event["workers"]) for event in events(run, "restart")]
    return {"status": result.exit_code, "error": result.error, "nodes": nodes, "restarts": causes}


def wait_for_ranks(run: Path, generation: int, step: int) -> None:
    """Returns once a rank of this generation is in this step."""
    while not any(
        file.read_text().startswith(f"{generation} forward {step} ") for file in (run / "logs").glob("rank-*.at")
    ):
        time.sleep(0.02)


def main(folder: str) -> int:
    """Prints one JSON object as its last line."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK}
    )
    told = {}
    try:
        others = [cluster.add_node(**NODE) for _ in range(2)]
        os.environ["RAY_ADDRESS"] = cluster.address

        kill = {"step": 2, "rank": 0, "do": "kill_on_node"}
        told["avoid"] = supervised(Path(folder, "avoid"), [kill, kill, ONCE], 3)
        told["avoid"]["victim"] = Path(folder, "avoid", "victim").read_text()

        def lose(number: int) -> None:
            if number == 0:
                wait_for_ranks(Path(folder, "shrink"), 0, 2)
                os.kill(others[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)
            if number == 1:
                wait_for_ranks(Path(folder, "shrink"), 1, 3)
                with patch("ray._private.utils.set_sigterm_handler"):  # possible in the main thread only
                    cluster.add_node(**NODE)
                threading.Event().wait()  # Linux ends a child of Ray together with the thread that started it

        told["shrink"] = supervised(Path(folder, "shrink"), [WAIT, {**WAIT, "step": 3}, ONCE], 3, lose)

        told["shrink"]["victim"] = others[0].node_id

        def drain(number: int) -> None:
            if number == 0:
                wait_for_ranks(Path(folder, "drain"), 0, 2)
                announce(cluster.address, [others[1].node_id], 60)  # what a machine says before it goes
                assert others[1].node_id in {node.id for node in living_nodes()}
                assert set(nodes_here(cluster.address)) == {node.id for node in living_nodes()}

        told["drain"] = supervised(Path(folder, "drain"), [WAIT, ONCE], 3, drain)
        told["drain"]["victim"] = others[1].node_id
    finally:
        cluster.shutdown()
    print("\n" + json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
