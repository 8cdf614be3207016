"""Starts a checked run under one of the four launchers, and says how it ended."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.causes import cause_of, first_cause
from cluster.context import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, LaunchResult
from cluster.flag import StopFlag
from cluster.signals import StopSignals
from cluster.supervisor import Generation
from data.errors import DataError
from data.orders import NAME as ORDERS
from data.orders import recorded
from launch.accounting import in_words, read_account, record_account
from launch.config import ConfigError, dump
from launch.identity import Identity, take_place
from launch.lasting import CLOSED, output_was_lost
from launch.lock import only_driver
from launch.preflight import Plan, pack_if_needed
from launch.resume import checkpoint_root
from launch.run_tokenizer import keep_for_training
from launch.runfolder import RunFolder
from launch.sections import read_place
from launch.supervise import NAMES, Launch, largest_world, newest_committed, run_supervised

if TYPE_CHECKING:
    from cluster.ray_pool import RayPool

ENTRY = "launch.worker:main"
ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    """One line for people, at once."""
    print(text, flush=True)


def start(
    plan: Plan,
    cause: str,
    *,
    entry: str = ENTRY,
    extra: Mapping[str, Any] | None = None,
    began: float | None = None,
    stop: StopFlag | None = None,
) -> LaunchResult:
    """Packs what has to be packed, writes the run's configuration, and trains under the plan's launcher.

    Args:
        plan: from `preflight.check`.
        cause: why the run is started, for events.jsonl.
        entry: what every rank runs, "module:function"; a benchmark has one of its own around the usual one.
        extra: JSON-able, for that entry; added to the payload.
        began: time.monotonic() when the command began, for the account of its time; None is now.
        stop: under MPI, set where a stop was asked for before the ranks have met: they stop before the first step.

    Raises:
        ConfigError: another process is training into the same folder, or another run keeps its checkpoints in
            this one's place.
        RefusedTogether: under MPI, on every rank, where rank 0 could not prepare the run.
    """
    began = time.monotonic() if began is None else began
    identity = None
    with ExitStack() as held:
        with _done_by_first(plan.launcher) as first:
            if first:
                held.enter_context(only_driver(plan.run))
                identity = _prepare(plan, cause, began)
        return _start(plan, cause, first, entry, extra or {}, identity, stop)


def _done_by_first(launcher: str) -> AbstractContextManager[bool]:
    """Yields whether this process does what is done once for the run; under MPI the others wait for its success."""
    if launcher != "mpi":
        return nullcontext(True)
    from cluster.mpi import mpi_world
    from cluster.mpi_exchange import done_by_first

    return done_by_first(mpi_world(), (ConfigError, DataError, OSError))


def _prepare(plan: Plan, cause: str, began: float) -> Identity:
    for note in plan.notes:
        say(note)
    identity = take_place(plan.run, plan.config, plan.accepted)
    pack_if_needed(plan, say)
    run = RunFolder(plan.run)
    run.create(dump(plan.config))
    told = keep_for_training(run.path, plan.config.data, plan.accepted)
    if told is not None:
        say(told)
    before = round(time.monotonic() - began, 3)
    run.event("launch", cause=cause, launcher=plan.launcher, workers=plan.world_size, seconds_before=before)
    if plan.changes:
        keys = {key: {"old": old, "new": new} for key, (old, new) in plan.changes.items()}
        changed = f"resumed with other settings: {', '.join(keys)}"
        run.event("change", cause=changed, keys=keys, accepted=plan.accepted)
    run.close()
    return identity


def _start(
    plan: Plan,
    cause: str,
    first: bool,
    entry: str,
    extra: Mapping[str, Any],
    identity: Identity | None,
    stop: StopFlag | None,
) -> LaunchResult:
    payload = {
        "config": asdict(plan.config),
        "run": str(plan.run),
        "resume": plan.resume,
        "accepted": list(plan.accepted),
        "orders_before": len(recorded(plan.run / ORDERS)),
        "identity": identity.table() if identity else None,
        "cause": cause,
        **extra,
    }
    started = time.monotonic()
    result = _launch(plan, entry, payload, stop)
    if first:
        _record_end(plan, result, time.monotonic() - started)
        _account(plan, result)
    return result


def _launch(plan: Plan, entry: str, payload: dict, stop: StopFlag | None) -> LaunchResult:
    spec, log_dir = plan.config.cluster, RunFolder(plan.run).logs
    if plan.launcher == "debug":
        from cluster import debug
        from launch.debugger import one_thread_at_a_time

        with one_thread_at_a_time():
            return debug.run(entry, payload, threads_per_worker=spec.threads_per_worker)
    if plan.launcher == "mpi":
        from cluster import mpi

        ep_size = plan.config.parallel.ep_size
        return mpi.run(entry, payload, spec, log_dir=log_dir, ep_size=ep_size, stop=stop)
    if plan.launcher == "local":
        return run_supervised(plan, payload, _local(plan, entry), say)
    from cluster.ray_pool import RayPool

    pool = RayPool(spec, lambda limit: largest_world(plan.config, limit), ROOT, insecure=plan.insecure)
    try:
        return run_supervised(plan, payload, _ray(plan, entry, pool), say, pool)
    finally:
        pool.connection.close()


def _local(plan: Plan, entry: str) -> Launch:
    from cluster import local

    spec, log_dir = plan.config.cluster, RunFolder(plan.run).logs

    def launch(generation: Generation, payload: dict, signals: StopSignals) -> LaunchResult:
        return local.run(entry, payload, spec, log_dir=log_dir, generation=generation.number, stop=signals.stop)

    return launch


def _ray(plan: Plan, entry: str, pool: "RayPool") -> Launch:
    from cluster import ray_actors

    log_dir = RunFolder(plan.run).logs
    root = checkpoint_root(plan.config, RunFolder(plan.run))
    shared = [root] if isinstance(root, Path) else []  # at an address, each rank writes there by itself

    def launch(generation: Generation, payload: dict, signals: StopSignals) -> LaunchResult:
        return ray_actors.run(
            entry, payload, pool.shape(generation.workers), log_dir=log_dir, ep_size=plan.config.parallel.ep_size,
            generation=generation.number, stop=signals.stop, pool=pool, leave=generation.leave,
            shared=shared,
        )  # fmt: skip

    return launch


def is_first(launcher: str) -> bool:
    """Whether this process speaks for the run: mpirun starts one driver for each rank, the others only one in all."""
    if launcher != "mpi":
        return True
    from cluster import mpi

    return mpi.world_rank() == 0


def _record_end(plan: Plan, result: LaunchResult, seconds: float) -> None:
    """Writes a failure's cause to the run's events; a clean end has been written by rank 0."""
    if result.exit_code in (EXIT_OK, EXIT_STOPPED):
        return
    run = RunFolder(plan.run)
    failure = first_cause(result.failures) if result.failures else None
    generation = result.generation
    committed = newest_committed(checkpoint_root(plan.config, run))
    place = read_place(run.logs, generation, failure.rank if failure else None)
    run.event(
        "failure",
        cause=cause_of(failure, place, NAMES) if failure else ("node" if result.reason == "capacity" else "refused"),
        rank=failure.rank if failure else None,
        signal=failure.signal if failure else None,
        exception=failure.exception[0] if failure and failure.exception else None,
        section=place.section,
        failed_step=place.step,
        step=committed,
        generation=generation,
        **({"reason": result.reason} if result.reason else {}),
        message=result.error[-4000:],
        seconds_running=round(seconds, 3),
    )
    run.close()


def _account(plan: Plan, result: LaunchResult) -> None:
    """Writes the launch's end, and where the run's time went up to it."""
    run = RunFolder(plan.run)
    how = {EXIT_OK: "done", EXIT_STOPPED: "stopped"}.get(result.exit_code, "failed")
    if output_was_lost():
        run.event("fault", cause=CLOSED)
    run.event("end", cause=how, exit_status=result.exit_code)
    record_account(run, how)
    run.close()


def report_end(plan: Plan, result: LaunchResult) -> int:
    """Prints why the run ended, where its time went if no summary follows, and returns the exit status."""
    if result.exit_code == EXIT_STOPPED:
        step = next((one["step"] for one in result.results if one), 0)
        say(f"stopped on request after step {step}, with a committed checkpoint; the same command goes on from there")
    elif result.exit_code != EXIT_OK:
        print(result.error or "the run failed", file=sys.stderr, flush=True)
        say(f"failed; output of every rank: {RunFolder(plan.run).logs}")
    found = read_account(plan.run) if result.exit_code != EXIT_OK else None
    if found is not None:
        say(f"time: {in_words(found)}")
    return result.exit_code if result.exit_code in (EXIT_OK, EXIT_STOPPED, 2) else EXIT_FAILED
