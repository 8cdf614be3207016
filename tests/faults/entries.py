"""A made-up training for tests of the supervisor: marks sections and publishes checkpoints, without torch."""

import os
import signal
import sys
import time
from pathlib import Path

from launch.sections import Sections
from launch.supervise import newest_committed

STEPS = 6


def toy(context, payload):
    """Does steps from the newest checkpoint on; `script` holds what goes wrong in each generation, the last for ever.

    payload: run; script: [{"step", "rank", "do"}, ...], step 0 is the start; commit: checkpoint after each so many.
    """
    run = Path(payload["run"])
    script = payload["script"]
    plan = script[min(context.generation, len(script) - 1)]
    sections = Sections(run / "logs", context.rank, context.generation)
    sections.mark("start")
    first = newest_committed(run / "checkpoints")
    for step in range(first, STEPS):
        if step > first or plan["step"]:
            sections.mark("forward", step + 1)
        if plan["do"] and plan["step"] == (step + 1 if plan["step"] else 0):
            if plan["do"] == "kill_on_node":
                kill_on_one_node(run, context.rank)
            elif context.rank == plan["rank"]:
                strike(plan["do"])
            if plan["do"] != "sigterm" or context.rank == plan["rank"]:  # ranks agree on a stop
                context.stop.wait(30)
            return {"status": "stopped", "step": step, "requested": True}
        if context.rank == 0 and (step + 1) % payload["commit"] == 0:
            folder = run / "checkpoints" / f"step-{step + 1:08d}"
            folder.mkdir(parents=True)
            (folder / "COMMIT").touch()
    return {"status": "done", "step": STEPS}


def kill_on_one_node(run, rank):
    """Kills a rank on the node that rank 1 had when it was first asked (Ray only)."""
    import ray

    node, victim = ray.get_runtime_context().get_node_id(), run / "victim"
    if rank == 1 and not victim.exists():
        victim.write_text(node)
    while not victim.exists():
        time.sleep(0.02)
    if victim.read_text() == node:
        strike("kill")


def strike(what):
    """What goes wrong."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)  # its handler sets the stop flag, which then ends the rank
    elif what == "exit":
        sys.exit(3)
    elif what == "type_error":
        raise TypeError("a mistake of the user's\nin two lines")
    elif what == "os_error":
        raise OSError(5, "the storage does not answer")
