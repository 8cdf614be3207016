"""`trimtab bench scaling`: the same training at several numbers of ranks, and what its efficiency is lost to."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from launch.bench_jobs import Job, JobError, run_jobs
from launch.bench_record import machine, write_record
from launch.bench_scaling_parts import LOSS_TOLERANCE
from launch.bench_scaling_plan import EVEN, Layout, Run, check_all, oversubscribed, result_path, usable_cores
from launch.bench_scaling_plots import plot
from launch.bench_scaling_table import network_rows, parity_sentence, render, rows_of
from launch.config import ConfigError, dump
from launch.output import print_json
from launch.preflight import Plan, pack_if_needed

SWEEP = tuple(4**power for power in range(6, 12))  # 4 KiB to 4 MiB
SWEEP_REPEATS = 20


def run(options: argparse.Namespace) -> int:
    """Makes the runs that have no result in `options.out` yet; prints the table, writes CSV, JSON and plot.

    Returns:
        1 where the losses of strong scaling do not agree, or a run failed.
    """
    wanted, layout, plans = check_all(options)
    base = options.base or min(options.sizes)
    out: Path = options.out
    for plan in plans.values():
        pack_if_needed(plan, _say)
    try:
        results = _run_all(wanted, layout, plans, out)
    except JobError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        print("what is done is kept in --out; the same command goes on from there", file=sys.stderr)
        return EXIT_FAILED
    rows = rows_of(results, options.modes, options.routings, options.sizes, base, wanted, options.warm_up)
    cores = usable_cores()
    for row in rows:
        row["ep_size"] = layout.ep_at(row["ranks"])
        row["nodes"] = layout.nodes_at(row["ranks"])
        row["note"] = oversubscribed(layout, row["ranks"], cores)
    facts = _facts(options, layout, base, plans, results)
    print(render(rows, facts))
    write_record(out, "scaling", rows, facts)
    drawn = plot(rows, facts, out / "scaling.png")
    print(f"written: {out}/scaling.csv, scaling.json{', scaling.png' if drawn else ''}")
    if options.json:
        print_json(json.loads((out / "scaling.json").read_text(encoding="utf-8")))
    return EXIT_OK if facts["losses_agree"] else EXIT_FAILED


def _run_all(
    wanted: Sequence[Run], layout: Layout, plans: dict[tuple[int, int], Plan], out: Path
) -> dict[Run, dict[str, Any]]:
    """Every run's result, from its file where there is one of the same settings."""
    settings = {run: _settings(run, layout, plans) for run in wanted}
    missing = [run for run in wanted if _result(out, run, settings[run]) is None]
    if len(missing) < len(wanted):
        _say(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done already")
    by_name = {run.name: run for run in missing}
    started, counted = time.monotonic(), [0]

    def done(job: Job) -> None:
        counted[0] += 1
        one = by_name[job.name]
        result = _result(out, one, settings[one])
        if result is None:
            raise JobError(f"{job.name} ended without a result; see {job.log}")
        last = result["metrics"][-1]
        left = (time.monotonic() - started) / counted[0] * (len(missing) - counted[0])
        _say(
            f"[{counted[0]}/{len(missing)}] {job.name}: {last['step_seconds'] * 1e3:.0f} ms in the last step, loss "
            f"{last['loss']:.5f}; about {left / 60:.1f} min left"
        )

    def running(jobs: list[Job]) -> None:
        for job in jobs:
            path = out / "runs" / job.name / "metrics.jsonl"
            steps = path.read_bytes().count(b"\n") if path.is_file() else 0
            _say(f"running: {job.name} step {steps} of {layout.steps}")

    if missing:
        with _cluster(layout, max(run.size for run in missing), next(iter(plans.values()))):
            run_jobs([_job(run, settings[run], plans, out) for run in missing], 1, done, running)
    found = {run: _result(out, run, settings[run]) for run in wanted}
    return {run: result for run, result in found.items() if result is not None}


def _settings(run: Run, layout: Layout, plans: dict[tuple[int, int], Plan]) -> dict[str, Any]:
    """What a result belongs to: another configuration must not be taken for it."""
    config = asdict(plans[run.size, run.batch].config)
    return json.loads(json.dumps({"config": config, "launcher": layout.launcher, "routing": run.routing}))


def _result(out: Path, run: Run, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished run's result.

    Raises:
        ConfigError: it is of other settings.
    """
    path = result_path(out, run)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        raise ConfigError([f"{path} is the result of other settings; give another --out, or delete it"])
    return result


def _job(run: Run, settings: dict[str, Any], plans: dict[tuple[int, int], Plan], out: Path) -> Job:
    config, job = (out / "configs" / f"{run.name}.{kind}" for kind in ("toml", "json"))
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(dump(plans[run.size, run.batch].config), encoding="utf-8")
    bench = {"even": run.routing == EVEN, "sweep": [] if run.routing == EVEN else SWEEP, "sweep_repeats": SWEEP_REPEATS}
    said = {"name": run.name, "launcher": settings["launcher"], "settings": settings, "bench": bench}
    job.write_text(json.dumps(said), encoding="utf-8")
    result = result_path(out, run)
    result.parent.mkdir(parents=True, exist_ok=True)
    arguments = (str(config), str(out / "runs" / run.name), str(result), str(job))
    return Job(run.name, "launch.bench_scaling_worker", arguments, out / "logs" / f"{run.name}.log")


@contextmanager
def _cluster(layout: Layout, most: int, plan: Plan) -> Iterator[None]:
    """For Ray: the cluster that RAY_ADDRESS names, else a local one on loopback while the block runs."""
    if layout.launcher != "ray" or os.environ.get("RAY_ADDRESS"):
        yield
        return
    from cluster.ray_local import RayStartError, start_local

    _say("ray: starting a local cluster on loopback")
    try:  # the number of CPUs is a count: more ranks than cores share them
        cluster = start_local(num_cpus=most * plan.config.cluster.cpus_per_worker)
    except RayStartError as error:
        raise JobError(str(error)) from error
    before = dict(os.environ)
    with cluster:
        os.environ.update(cluster.environment())
        try:
            yield
        finally:
            for name in cluster.environment():
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]


def _facts(
    options: argparse.Namespace,
    layout: Layout,
    base: int,
    plans: dict[tuple[int, int], Plan],
    results: dict[Run, dict[str, Any]],
) -> dict[str, Any]:
    config = next(iter(plans.values())).config
    agree, sentence = parity_sentence(results, base, layout.steps)
    return {
        "benchmark": "scaling",
        "preset": options.preset,
        "set": list(options.set),
        "launcher": layout.launcher,
        "base": base,
        "repeats": options.repeats,
        "steps": options.steps,
        "warm_up": options.warm_up,
        "micro_batch": layout.micro_batch,
        "threads": layout.threads,
        "seq_len": config.data.seq_len,
        "zero_stage": config.parallel.zero_stage,
        "dispatch": config.parallel.dispatch,
        "hidden_size": config.model.hidden_size,
        "experts": config.model.n_routed_experts,
        "top_k": config.model.num_experts_per_tok,
        "collectives_timed": all(result["collectives_timed"] for result in results.values()),
        "losses_agree": agree,
        "loss_tolerance": LOSS_TOLERANCE,
        "loss_parity": sentence,
        "network": network_rows(results, SWEEP),
        "machine": machine(("torch", "numpy", "deepspeed", *(("ray",) if layout.launcher == "ray" else ()))),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
