"""A driver for the tests: `python -m tests.ray.drive JSON` launches on Ray and prints the result as its last line."""

import json
import sys
import time
from pathlib import Path

from cluster import ray_actors
from cluster.config import ClusterConfig
from cluster.ray_gang import Gang


def main(argument: str) -> int:
    """argument: [entry, payload, cluster section, log folder, project root or null, options]."""
    entry, payload, spec, log_dir, root, options = json.loads(argument)
    if options.pop("blind", False):
        _hide_logs()
    began = time.monotonic()
    result = ray_actors.run(
        entry,
        payload,
        ClusterConfig(**spec),
        log_dir=Path(log_dir),
        code=Path(root) if root else None,
        folders=("cluster", "tests"),
        **options,
    )
    kinds = [[failure.rank, failure.kind] for failure in result.failures]
    seconds = time.monotonic() - began
    print(json.dumps([result.exit_code, result.results, result.error, kinds, seconds]), flush=True)
    return result.exit_code


def _hide_logs() -> None:
    """Makes this driver believe that no worker's node sees its log folder, as on machines without a shared disk."""
    place = Gang.place

    def place_blindly(gang: Gang) -> None:
        place(gang)
        for worker in gang.workers:
            assert worker.place["sees_logs"]
            worker.place["sees_logs"] = False

    Gang.place = place_blindly


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
