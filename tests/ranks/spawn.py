"""Runs a function on several real ranks (processes, Gloo) and brings back what each returned."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    world_size: int, function: str, payload: dict[str, Any] | None = None, timeout_s: float = 240,
    group_timeout_s: float = 120,
) -> list[Any]:  # fmt: skip
    """Calls `module:function(rank, world_size, payload)` on each rank; returns the JSON-able results by rank.

    A function that leaves its ranks out of step on purpose gives a short group_timeout_s, and does without a barrier.

    Raises:
        AssertionError: with the first rank's traceback that is not a mere consequence, or naming ranks that hung.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-ranks-") as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
        Path(folder, "payload.json").write_text(json.dumps(payload or {}))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.spawn", function, str(rank), str(world_size), folder,
                 str(group_timeout_s)],
                cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=Path(folder, f"stderr-{rank}").open("w"),  # noqa: SIM115 - the child owns it
            )
            for rank in range(world_size)
        ]  # fmt: skip
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in processes):
                failed = [process for process in processes if process.poll()]
                if failed:
                    time.sleep(1.0)
                    break
                if time.monotonic() > deadline:
                    hung = [rank for rank, process in enumerate(processes) if process.poll() is None]
                    raise AssertionError(f"ranks {hung} were still running {function} after {timeout_s} s")
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()
        broken = [rank for rank, process in enumerate(processes) if process.returncode > 0]
        if broken:
            first = min(broken, key=lambda rank: _failed_at(folder, rank))
            error = Path(folder, f"stderr-{first}").read_text()
            raise AssertionError(f"rank {first} of {world_size} failed in {function}:\n{error}")
        return [json.loads(Path(folder, f"result-{rank}.json").read_text()) for rank in range(world_size)]


def _failed_at(folder: str, rank: int) -> float:
    marker = Path(folder, f"failed-{rank}")
    return float(marker.read_text()) if marker.exists() else float("inf")


def _main(function: str, rank: int, world_size: int, folder: str, group_timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    payload = json.loads(Path(folder, "payload.json").read_text())
    module, _, name = function.partition(":")
    from parallel.ranks import join_process_group

    try:
        join_process_group(f"file://{folder}/rendezvous", rank, world_size, "gloo", group_timeout_s, "lo")
        result = getattr(importlib.import_module(module), name)(rank, world_size, payload)
        Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
        if group_timeout_s >= 120:
            dist.barrier()
    except BaseException:
        Path(folder, f"failed-{rank}").write_text(f"{time.time():.6f}")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if group_timeout_s >= 120:
        dist.destroy_process_group()
    os._exit(0)  # DeepSpeed's exit handlers talk about groups that are gone


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
