"""Entries for the launchers' tests: tiny functions that a rank runs, torch only where a process group is the point."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from cluster.places import place_line, section_file


def echo(context, payload):
    return {"rank": context.rank, "payload": payload}


def describe(context, payload):
    print(f"rank {context.rank} is here")
    print("a word to standard error", file=sys.stderr)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "PMIX_RANK", "SLURM_PROCID")
    return {
        "rank": context.rank,
        "world_size": context.world_size,
        "local_rank": context.local_rank,
        "local_world_size": context.local_world_size,
        "node_rank": context.node_rank,
        "n_nodes": context.n_nodes,
        "init_method": context.init_method,
        "generation": context.generation,
        "launcher": context.launcher,
        "pid": os.getpid(),
        "thread": threading.current_thread().name,
        "torch_loaded": "torch" in sys.modules,
        "environment": {name: os.environ.get(name) for name in names},
    }


def fail(context, payload):
    if context.rank == payload["rank"]:
        time.sleep(payload.get("after", 0))
        raise ValueError(f"rank {context.rank} was told to fail")
    print("waiting for a peer that will not come", flush=True)
    time.sleep(payload.get("others", 0))
    return {}


def leave(context, payload):
    sys.exit(payload["status"])


def unfit(context, payload):
    return {"x": {1, 2}}


def die(context, payload):
    """The rank kills itself; with stop_too, the others ignore requests to stop."""
    note_pid(context, payload)
    if context.rank == payload["rank"]:
        print("last words", flush=True)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)
    return {}


def work_until_stopped(context, payload):
    note_pid(context, payload)
    steps = 0
    while not context.stop.wait(0.05):
        steps += 1
        if steps == 1:
            print(f"rank {context.rank} works", flush=True)
    time.sleep(payload.get("saving", 0))
    print(f"rank {context.rank} has saved", flush=True)
    return {"status": "stopped", "steps": steps}


def ignore_stop(context, payload):
    note_pid(context, payload)
    print(f"rank {context.rank} works", flush=True)
    end = time.monotonic() + payload["seconds"]
    while time.monotonic() < end:
        time.sleep(0.05)
    return {}


def hang_after_the_result(context, payload):
    threading.Thread(target=time.sleep, args=(300,)).start()
    return {"rank": context.rank}


def stop_at_breakpoint(context, payload):
    answer = payload["answer"]
    breakpoint()
    return {"answer": answer}


def reduce(context, payload):
    """Sums rank + 1 over a Gloo group, as any training would."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=context.init_method,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=60),
    )
    total = torch.full((4,), float(context.rank + 1))
    dist.all_reduce(total)
    if context.rank == payload.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "die" in payload:
        dist.all_reduce(total)
    dist.destroy_process_group()
    return {"total": total.tolist(), "threads": torch.get_num_threads()}


def note_pid(context, payload):
    if "pids" in payload:
        with open(os.path.join(payload["pids"], f"pid-{context.rank}"), "w") as file:
            file.write(str(os.getpid()))


def stay(context, payload):
    """Rank 1 stays in one section for ever; the others go on, and end when asked to."""
    file = section_file(Path(payload["folder"]), context.rank)
    file.write_bytes(place_line(0, "data", 3, time.time()))
    while context.rank == 1 or not context.stop.is_set():
        if context.rank != 1:
            file.write_bytes(place_line(0, "data", 3, time.time()))
        time.sleep(0.05)
    return {"status": "stopped"}
