"""Runs the fixed selection of the exactness contract in trees of the code, each in a fork of one process.

    python mutants.py '{"data": ..., "trees": {name: folder, ...}}'

prints {name: what was broken, or empty} as JSON. Torch is imported once, before the forks, and everything else in them,
each from its own tree.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LIMIT_S = 100
AT_ONCE = 2


def check(tree: str, data: str) -> str:
    """What the contract has to say about a tree."""
    os.chdir(tree)
    sys.path.insert(0, tree)
    sys.modules["tensorboard"] = None  # type: ignore[assignment]  # slow to import, and its figures are not read
    with tempfile.TemporaryDirectory() as folder:
        try:
            from tests.ranks.contract_oracle import check_contract

            check_contract(Path(data), Path(folder))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(where.filename).name}, {where.name})"
    return ""


def warm_up() -> None:
    """Imports what every fork needs; torch imports a good part of itself when an optimizer first steps."""
    import torch
    import torch.distributed
    import torch.utils.checkpoint

    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], fused=True).step()


def main(payload: dict[str, Any]) -> dict[str, str]:
    """Checks every tree, a few at once."""
    warm_up()
    waiting = list(payload["trees"].items())
    running: dict[int, tuple[str, int]] = {}  # process -> name, where it writes
    found: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name, tree = waiting.pop(0)
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                signal.alarm(LIMIT_S)  # a hang ends here, and is told from what was found
                os.close(read)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.write(write, (check(tree, payload["data"]) or "nothing").encode()[-3000:])
                os._exit(0)
            os.close(write)
            running[child] = (name, read)
        child, _ = os.wait()
        name, read = running.pop(child)
        said = os.read(read, 4000).decode(errors="replace") or f"hung for {LIMIT_S} s, or died"
        found[name] = "" if said == "nothing" else said
        os.close(read)
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
