"""Ties the supervisor to a run: launcher, checkpoints, events, and the samples of a step that keeps failing."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from threading import Thread
from typing import Any

from cluster.causes import Names, Place
from cluster.context import LaunchResult
from cluster.signals import StopSignals
from cluster.supervisor import Generation, OneMachine, Policy, Pool, Surroundings, supervise
from cluster.worlds import legal_worlds
from launch.accounting import record_account
from launch.config import Config
from launch.preflight import Plan
from launch.resume import checkpoint_root
from launch.runfolder import RunFolder
from launch.sections import read_place
from parallel.roots import Root, newest_step, quickly, readable

# Exceptions whose cause their class tells, wherever they were raised; base classes count.
NAMES = Names(
    storage=("CheckpointError", "StorageError"),
    numeric=("NonFiniteError", "TrainingDivergedError", "BiasMismatchError", "ReplicaMismatchError"),
)

Launch = Callable[[Generation, dict[str, Any], StopSignals], LaunchResult]


def run_supervised(
    plan: Plan, payload: dict[str, Any], launch: Launch, say: Callable[[str], None], pool: Pool | None = None
) -> LaunchResult:
    """Trains through failures; see `cluster.supervisor.supervise`.

    Args:
        payload: of the entry; from the second generation on it takes the newest readable checkpoint.
        launch: starts one generation with a payload; the signals' `stop` is set on request.
        pool: where ranks can be placed; None is this machine.
    """
    run = RunFolder(plan.run)
    config, spec = plan.config, plan.config.cluster
    policy = Policy(
        workers=spec.workers,
        min_workers=spec.min_workers,
        restarts=spec.restarts,
        backoff_s=spec.backoff_s,
        backoff_max_s=spec.backoff_max_s,
        wait_for_nodes_s=spec.wait_for_nodes_s,
    )

    accounts: list[Thread] = []

    def account_beside(why: str, step: int) -> None:
        """Reading a long run's records takes seconds, for which no restart should wait."""
        accounts.append(Thread(target=record_account, args=(run, why), kwargs={"step": step}, daemon=True))
        accounts[-1].start()

    def event(kind: str, *, cause: str, **more: Any) -> None:
        run.event(kind, cause=cause, **more)
        if kind == "restart":
            account_beside(f"restart {more['generation']}", more["step"])
            say(f"restart {more['generation']}: from step {more['step']} with {more['workers']} workers")

    def one(generation: Generation) -> LaunchResult:
        return launch(generation, payload_of(payload, config, generation), signals)

    with StopSignals() as signals:
        around = Surroundings(
            committed=lambda: newest_committed(checkpoint_root(config, run)),
            place=lambda generation, rank: read_place(run.logs, generation, rank),
            legal=lambda limit: largest_world(config, limit),
            event=event,
            poison=lambda place: keep_samples(config, run, place),
            say=say,
            names=NAMES,
        )
        try:
            return supervise(one, policy, around, signals.stop, pool or OneMachine())
        finally:
            for account in accounts:
                account.join(60.0)
            run.close()


def payload_of(payload: dict[str, Any], config: Config, generation: Generation) -> dict[str, Any]:
    """What a generation's ranks are told: the first start as it is, a restart from the newest readable checkpoint."""
    if generation.number == 0:
        return payload
    cluster = replace(config.cluster, workers=generation.workers)
    return {
        **payload,
        "config": asdict(replace(config, cluster=cluster)),
        "resume": "auto",
        "recovery": generation.recovery,
        "cause": f"restart because of {(generation.recovery or {}).get('cause')}",
    }


def newest_committed(root: Root) -> int:
    """Step of the newest checkpoint that was published; 0 when there is none, or an address does not answer."""
    try:
        return newest_step(quickly(root))
    except OSError:
        return 0


def largest_world(config: Config, limit: int) -> int | None:
    """The most ranks, at most `limit`, that this configuration can run on."""
    return legal_worlds(
        limit,
        n_routed_experts=config.model.n_routed_experts,
        ep_size=config.parallel.ep_size,
        lanes=config.data.lanes,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    ).largest(limit)


def keep_samples(config: Config, run: RunFolder, place: Place) -> str:
    """Writes which sequences and documents a step read, for a step that failed too often; says where.

    The order of the data is a pure function of the configuration, so that no rank has to survive for this.
    """
    if place.step is None or place.is_starting or config.data.mode == "stream":
        return ""
    from data.mixture import MixedPlan, open_data, plan_of
    from data.orders import go_on
    from data.plan import Plan
    from data.provenance import origins

    dataset, cursor = open_data(config.data), _saved_cursor(checkpoint_root(config, run))
    try:
        batch_size = config.train.global_batch_size
        if cursor is None:
            plan: Plan | MixedPlan = plan_of(dataset, config.data, batch_size)
            ids = plan.batch(place.step - 1, batch_size)
        else:  # it knows which ranges were skipped
            order = go_on(dataset, config.data, batch_size, cursor)
            plan, ids = order.plan, order.plan.sequence_ids(order.batches.numbers(place.step - 1))
        documents, n_documents = origins(dataset, plan, ids.tolist(), limit=4096)
    finally:
        dataset.close()
    path = run.path / f"failed-step-{place.step:08d}.json"
    record: dict[str, Any] = {"step": place.step, "section": place.section, "sequence_ids": ids.tolist()}
    record |= {"n_documents": n_documents, "documents": [one._asdict() for one in documents]}
    path.write_text(json.dumps(record) + "\n")
    return f"its samples are listed in {path}"


def _saved_cursor(root: Root) -> dict[str, Any] | None:
    """The data cursor of the newest published checkpoint, None where none can be read."""
    try:
        found = readable(quickly(root))
        return json.loads((found[-1] / "manifest.json").read_text())["cursor"] if found else None
    except (OSError, ValueError, KeyError):
        return None
