"""Runs of the debug launcher as forks of one process: `python -m tests.faults.forks CONFIG FOLDER POINT...`.

A point `objects:NAME` keeps the run's checkpoints at an address of `tests.object_store` instead of in a folder.
"""

import json
import os
import sys
from pathlib import Path

from launch.cli import main as trimtab
from parallel.checkpoint import damaged_files, open_checkpoint
from parallel.roots import committed, drafts, root_of
from tests import object_store


def forked(*arguments: str) -> int:
    """`trimtab` in a fork; its exit status, or -n where signal n ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = trimtab(list(arguments))
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(config: str, folder: str, *points: str) -> int:
    """Writes POINT.json: both statuses, and what the first run left in the folder of checkpoints."""
    import torch

    import launch.worker  # noqa: F401 - imported once, before the first fork

    torch.set_num_threads(1)
    common = ("train", config, "--launcher", "debug", "--no-summary", "checkpoint.keep=2")
    if forked(*common, "--run", f"{folder}/undisturbed"):
        return 1
    object_store.register()
    for name in points:
        where, _, point = name.rpartition(":")
        address = f"objects://bucket/{point}" if where else ""
        command = (*common, "--run", f"{folder}/{name}", f"faults.inject=kill@step=4,phase=save,at={point}")
        command += (f"checkpoint.dir={address}",) if address else ()
        first = forked(*command)
        root = root_of(address or f"{folder}/{name}/checkpoints", 20.0)
        readable = [path for path in committed(root) if not damaged_files(open_checkpoint(path))]
        told = {
            "readable": [open_checkpoint(path).step for path in readable],
            "drafts": [path.name for path in drafts(root)],
        }
        told["statuses"] = [first, forked(*command)]
        told["left"] = [path.name for path in (*committed(root), *drafts(root))]
        Path(folder, f"{name}.json").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
