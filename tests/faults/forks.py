"""Runs of the debug launcher as forks of one process: `python -m tests.faults.forks CONFIG FOLDER POINT...`."""

import json
import os
import sys
from pathlib import Path

from launch.cli import main as trimtab
from parallel.checkpoint import committed, damaged_files, open_checkpoint


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
    for point in points:
        command = (*common, "--run", f"{folder}/{point}", f"faults.inject=kill@step=4,phase=save,at={point}")
        first = forked(*command)
        root = Path(folder, point, "checkpoints")
        readable = [path for path in committed(root) if not damaged_files(open_checkpoint(path))]
        told = {
            "readable": [open_checkpoint(path).step for path in readable],
            "drafts": [path.name for path in root.iterdir() if path.name.startswith(".")],
        }
        told["statuses"] = [first, forked(*command)]
        Path(folder, f"{point}.json").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
