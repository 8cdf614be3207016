"""The entry of every rank: joins the others, builds a session, resumes, trains."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.context import RankContext
from launch.allocator import keep_freed_memory
from launch.config import Config, from_tables
from launch.runfolder import RunFolder
from launch.session import Session, assemble
from launch.train import train
from parallel.ranks import Ranks, choose_device, join_process_group, process_ranks, single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks

Prepare = Callable[[Session], None]


def main(context: RankContext, payload: dict[str, Any], prepare: Prepare | None = None) -> dict[str, Any]:
    """Trains one rank.

    Args:
        context: the rank's place.
        payload: config (tables), run (path), resume (auto, must, never), accepted (changed keys the user accepts),
            cause (why the run was started, for events.jsonl).
        prepare: called with the session before the first step; for benchmarks, which put their timers around it.

    Returns:
        {"status": "done" or "stopped", "step": n}.
    """
    config = from_tables(payload["config"])
    plain = context.launcher == "debug"
    keep_freed_memory()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls deprecated, once a process.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    device = choose_device(config.cluster.accelerator, context.device_index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if plain and config.parallel.virtual_ranks > 1:

        def work(world: Any, rank: int) -> dict[str, Any]:
            parallel = config.parallel
            ranks = virtual_ranks(world, parallel.ep_size, rank, parallel.ranks_per_node)
            return _train(config, payload, ranks, device, context, plain, prepare)

        return run_virtual_ranks(config.parallel.virtual_ranks, work)[0]
    if plain:
        return _train(config, payload, single_rank(), device, context, plain, prepare)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout_s = config.parallel.timeout_s
    join_process_group(context.init_method, context.rank, context.world_size, backend, timeout_s, context.interface)
    parallel = config.parallel
    per_node = 0
    if parallel.dispatch == "two_hop":
        per_node = parallel.ranks_per_node or context.local_world_size
    ranks = process_ranks(parallel.ep_size, timeout_s, per_node)
    return _train(config, payload, ranks, device, context, plain, prepare)


def _train(
    config: Config,
    payload: dict[str, Any],
    ranks: Ranks,
    device: torch.device,
    context: RankContext,
    plain: bool,
    prepare: Prepare | None,
) -> dict[str, Any]:
    run = RunFolder(Path(payload["run"]))
    session = assemble(config, run, ranks, device, context.stop, local_rank=context.local_rank, plain=plain)
    try:
        layout = ranks.layout
        session.telemetry.event(
            "start",
            cause=payload["cause"],
            launcher=context.launcher,
            world_size=layout.world_size,
            ep_size=layout.ep_size,
            zero_stage=None if plain else config.parallel.zero_stage,
            device=str(device),
            threads_per_rank=torch.get_num_threads(),
        )
        first_step = session.resume(payload["resume"], payload["accepted"])
        if first_step:
            session.telemetry.event("resume", cause="newest committed checkpoint", step=first_step)
        if prepare is not None:
            prepare(session)
        result = train(session, first_step)
        session.telemetry.event("stop", cause=result["status"], step=result["step"])
        return result
    except RuntimeError as error:  # a rank may be gone that this one did not wait for
        ranks.watch.explain(error)
        raise
    finally:
        session.close()
