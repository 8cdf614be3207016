"""The entry of every rank: joins the others, builds a session, resumes, trains."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.context import RankContext
from kernels.products import choose_products, in_steps
from launch.allocator import keep_freed_memory
from launch.config import Config, from_tables
from launch.drills import Faults
from launch.runfolder import RunFolder
from launch.sections import Sections
from launch.session import Session, assemble
from launch.start_facts import in_words, start_facts
from launch.train import tell_data, train
from parallel.ownership import Identity
from parallel.ranks import Ranks, choose_device, join_process_group, process_ranks, single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks

Prepare = Callable[[Session], None]


def main(context: RankContext, payload: dict[str, Any], prepare: Prepare | None = None) -> dict[str, Any]:
    """Trains one rank.

    Args:
        context: the rank's place.
        payload: config (tables), run (path), resume (auto, must, never), accepted (changed keys the user accepts),
            identity (of the run, see `launch.identity`; rank 0's counts),
            cause (why the run was started, for events.jsonl), and for a restart recovery (why and when the generation
            before it ended, see `cluster.supervisor`).
        prepare: called with the session before the first step; for benchmarks, which put their timers around it.

    Returns:
        {"status": "done" or "stopped", "step": n}.
    """
    config = from_tables(payload["config"])
    plain = context.launcher == "debug"
    virtual = plain and config.parallel.virtual_ranks > 1
    watch = None if virtual else _watch(config, payload, context.rank, context)
    keep_freed_memory()
    choose_products()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls deprecated, once a process.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    device = choose_device(
        config.cluster.accelerator, context.device_index, context.local_world_size if context.launcher == "local" else 1
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if watch is None:

        def work(world: Any, rank: int) -> dict[str, Any]:
            parallel = config.parallel
            ranks = virtual_ranks(world, parallel.ep_size, rank, parallel.ranks_per_node)
            watch = _watch(config, payload, rank, context)
            return _train(config, payload, ranks, device, context, plain, watch, prepare)

        return run_virtual_ranks(config.parallel.virtual_ranks, work)[0]
    if plain:
        return _train(config, payload, single_rank(), device, context, plain, watch, prepare)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout_s = config.parallel.timeout_s
    join_process_group(context.init_method, context.rank, context.world_size, backend, timeout_s, context.interface)
    parallel = config.parallel
    per_node = 0
    if parallel.dispatch == "two_hop":
        per_node = parallel.ranks_per_node or context.local_world_size
    ranks = process_ranks(parallel.ep_size, timeout_s, per_node)
    return _train(config, payload, ranks, device, context, plain, watch, prepare)


Watch = tuple[Sections, Faults]


def _watch(config: Config, payload: dict[str, Any], rank: int, context: RankContext) -> Watch:
    """Where this rank's place is noted, and its drills; the section `start` begins."""
    run = RunFolder(Path(payload["run"]))
    sections = Sections(run.logs, rank, context.generation)
    sections.mark("start")
    faults = Faults(config.faults.inject, rank, run.faults_path, context.generation)
    faults.at("start")
    return sections, faults


def _train(
    config: Config,
    payload: dict[str, Any],
    ranks: Ranks,
    device: torch.device,
    context: RankContext,
    plain: bool,
    watch: Watch,
    prepare: Prepare | None,
) -> dict[str, Any]:
    run = RunFolder(Path(payload["run"]))
    sections, faults = watch
    entered = time.time()
    session = assemble(
        config, run, ranks, device, context.stop, local_rank=context.local_rank, plain=plain, faults=faults,
        sections=sections, identity=Identity.of(payload["identity"]) if payload.get("identity") else None,
    )  # fmt: skip
    try:
        layout = ranks.layout
        facts = start_facts(config.model, device, context.launcher) if session.telemetry.main else {}
        session.telemetry.event(
            "start",
            cause=payload["cause"],
            generation=context.generation,
            launcher=context.launcher,
            world_size=layout.world_size,
            ep_size=layout.ep_size,
            zero_stage=None if plain else config.parallel.zero_stage,
            device=str(device),
            threads_per_rank=torch.get_num_threads(),
            cpu_products="onednn" if in_steps() else "mkl",
            **facts,
        )
        if facts:
            session.telemetry.note(in_words(facts))
        loading = time.time()
        session.at("load")
        first_step = session.resume(payload["resume"], payload["accepted"], payload.get("orders_before"))
        if first_step:
            session.telemetry.event("resume", cause="newest committed checkpoint", step=first_step)
        if payload.get("recovery"):
            _recovered(session, payload["recovery"], context.generation, first_step, entered, loading)
        if prepare is not None:
            prepare(session)
        result = train(session, first_step)
        tell_data(session, result["step"], last=True)
        saving = round(session.saves.take_held(), 3)
        session.telemetry.event("stop", cause=result["status"], step=result["step"], seconds_saving=saving)
        return result
    except RuntimeError as error:  # a rank may be gone that this one did not wait for
        ranks.watch.explain(error)
        raise
    finally:
        session.close()
        sections.close()


def _recovered(
    session: Session, recovery: dict[str, Any], generation: int, step: int, entered: float, loading: float
) -> None:
    """Writes where the time of a restart went. Times are of the wall clock, which the driver and rank 0 share."""
    now = time.time()
    parts = {
        "teardown": recovery["ended_at"] - recovery["observed_at"],
        "waiting": recovery["launched_at"] - recovery["ended_at"],
        "processes": entered - recovery["launched_at"],
        "assembly": loading - entered,
        "load": now - loading,
    }
    session.telemetry.event(
        "recovered",
        cause=recovery["cause"],
        step=step,
        generation=generation,
        seconds_in_all=round(max(0.0, now - recovery["observed_at"]), 3),
        **{f"seconds_{name}": round(max(0.0, value), 3) for name, value in parts.items()},
    )
