"""A driver for the tests: `python -m tests.ray.drive JSON` launches on Ray and prints the result as its last line."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import ray_actors
from cluster.config import ClusterConfig
from cluster.ray_gang import Gang


def main(argument: str) -> int:
    """argument: [entry, payload, cluster section, log folder, project root or null, options]."""
    entry, payload, spec, log_dir, root, options = json.loads(argument)
    if options.pop("blind", False):
        _hide_folders()
    if version := options.pop("ray_version", ""):
        _pretend_version(version)
    options["shared"] = [Path(folder) for folder in options.get("shared", ())]
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


def _hide_folders() -> None:
    """Makes this driver believe that no worker's node sees its folders, as on machines without a shared disk."""
    get = Gang._get

    def get_blindly(gang: Gang, references: Sequence, what: str, ranked: bool = False) -> list:
        answers = get(gang, references, what, ranked)
        for answer in answers if what == "each worker's place" else ():
            assert set(answer["missing"]) == {""}
            answer["missing"] = ["does not see {folder}"] * len(answer["missing"])
        return answers

    Gang._get = get_blindly


def _pretend_version(version: str) -> None:
    """This process takes itself for one of the cluster's real version, and the cluster for another."""
    from ray._private import utils

    check = utils.check_version_info

    def check_other(cluster_metadata: dict, *arguments: object, **options: object) -> None:
        check({**cluster_metadata, "ray_version": version}, *arguments, **options)

    utils.check_version_info = check_other


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
