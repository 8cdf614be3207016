"""Three Ray nodes on this machine, one killed hard in the middle of a run: `python -m tests.faults.ray_drill JSON`.

JSON: [arguments of `trimtab`, the run's folder, the step after which a node dies].
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from cluster.process import descendants
from cluster.ray_nodes import living_nodes

NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024, "include_log_monitor": False}
# A dead node counts as one after five seconds instead of half a minute; a slow one must not.
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 5}


def main(argument: str) -> int:
    """Prints the status and what happened to the nodes as its last line."""
    from ray.cluster_utils import Cluster

    from launch.cli import main as trimtab

    arguments, run, step = json.loads(argument)
    told: dict = {}
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK}
    )
    try:
        others = [cluster.add_node(**NODE) for _ in range(2)]
        os.environ["RAY_ADDRESS"] = cluster.address

        def kill() -> None:
            metrics = Path(run) / "metrics.jsonl"
            while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
                time.sleep(0.02)
            raylets = {node.node_id: node.all_processes["raylet"][0].process.pid for node in others}
            told["killed"] = next(node for node, pid in raylets.items() if holds_a_rank(pid))
            told["nodes_before"] = len(living_nodes())
            told["killed_at"] = time.time()
            os.kill(raylets[told["killed"]], signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        told["status"] = trimtab(arguments)
        thread.join(1.0)
    finally:
        cluster.shutdown()
    print("\n" + json.dumps(told), flush=True)
    return 0


def holds_a_rank(raylet: int) -> bool:
    """Whether one of the raylet's workers is a rank; Ray names its processes."""
    titles = (Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(raylet))
    return any(title.startswith(b"ray::RankActor") for title in titles)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
