"""`trimtab bench balance`: the same model, data and token budget under every rule, over several seeds."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from data.dataset import describe
from launch.bench_balance_arms import Training, search_trainings, trainings
from launch.bench_balance_data import prepare
from launch.bench_balance_plots import plot
from launch.bench_balance_table import aggregate, render, verdicts
from launch.bench_jobs import Job, JobError, run_jobs
from launch.bench_record import machine, write_record
from launch.bench_skew import run_skew
from launch.config import ConfigError, dump
from launch.output import print_json

_SEARCH_SEED = 100


def run(options: argparse.Namespace) -> int:
    """Trains whatever has no result in `options.out` yet, prints the table, writes CSV, JSON and plots."""
    out: Path = options.out
    if options.skew:
        return run_skew(out, options.json)
    if options.steps < 10 or options.seeds < 1 or options.jobs < 1:
        raise ConfigError(["--steps must be at least 10, --seeds and --jobs at least 1"])
    out.mkdir(parents=True, exist_ok=True)
    data = prepare(options.data, out, _say)
    if options.search:
        wanted = search_trainings(data, options.steps, options.rules, _SEARCH_SEED, options.set)
    else:
        seeds = range(options.seeds)
        wanted = trainings(data, options.steps, options.rules, options.also, seeds, options.set)
    try:
        results = _train_all(wanted, out, options.jobs)
    except JobError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        print("what is done is kept in --out; the same command goes on from there", file=sys.stderr)
        return EXIT_FAILED
    rows = aggregate(results)
    name = "balance-search" if options.search else "balance"
    facts = _facts(options, wanted, data)
    if not options.search:
        facts["verdicts"] = verdicts(rows)
    print(_title(wanted[0], facts))
    print(render(rows))
    for sentence in facts.get("verdicts", ()):
        print(sentence)
    write_record(out, name, rows, facts)
    drawn = plot(results, rows, out, name)
    print(f"written: {out}/{name}.csv, {name}.json{''.join(f', {path.name}' for path in drawn)}")
    if options.json:
        print_json(json.loads((out / f"{name}.json").read_text(encoding="utf-8")))
    return EXIT_OK


def _train_all(wanted: Sequence[Training], out: Path, at_once: int) -> list[dict[str, Any]]:
    """The result of every training, from its file where there is one of the same configuration."""
    missing = [training for training in wanted if _result(out, training) is None]
    if len(missing) < len(wanted):
        _say(f"{len(wanted) - len(missing)} of {len(wanted)} trainings are done already")
    started, counted = time.monotonic(), [0]
    by_name = {training.name: training for training in missing}

    def done(job: Job) -> None:
        counted[0] += 1
        result = _result(out, by_name[job.name])
        if result is None:
            raise JobError(f"{job.name} ended without a result; see {job.log}")
        vio = "" if result["heldout_max_vio"] is None else f", max_vio {result['heldout_max_vio']:.3f} held out"
        left = (time.monotonic() - started) / counted[0] * (len(missing) - counted[0])
        _say(
            f"[{counted[0]}/{len(missing)}] {job.name} ({result['setting']}): loss {result['heldout_loss']:.4f}{vio}; "
            f"about {left / 60:.0f} min left"
        )

    def running(jobs: list[Job]) -> None:
        steps = [f"{job.name} step {_steps_done(out, job.name)}" for job in jobs]
        _say(f"running: {', '.join(steps)} of {wanted[0].config.train.steps}")

    run_jobs([_job(training, out) for training in missing], at_once, done, running)
    results = [_result(out, training) for training in wanted]
    return [result for result in results if result is not None]


def _job(training: Training, out: Path) -> Job:
    config = out / "configs" / f"{training.name}.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(dump(training.config), encoding="utf-8")
    arguments = (str(config), str(out / "runs" / training.name), str(_result_path(out, training)), training.arm,
                 str(training.seed), training.setting, str(training.heldout_every))  # fmt: skip
    _result_path(out, training).parent.mkdir(parents=True, exist_ok=True)
    return Job(training.name, "launch.bench_balance_worker", arguments, out / "logs" / f"{training.name}.log")


def _result_path(out: Path, training: Training) -> Path:
    return out / "trainings" / f"{training.name}.json"


def _result(out: Path, training: Training) -> dict[str, Any] | None:
    """A finished training's result.

    Raises:
        ConfigError: the result is of another configuration.
    """
    path = _result_path(out, training)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["config"] != json.loads(json.dumps(asdict(training.config))):
        raise ConfigError([f"{path} is the result of another configuration; give another --out, or delete it"])
    return result


def _steps_done(out: Path, name: str) -> int:
    path = out / "runs" / name / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _facts(options: argparse.Namespace, wanted: Sequence[Training], data: str) -> dict[str, Any]:
    config = wanted[0].config
    found = describe(data)
    return {
        "benchmark": "balance",
        "steps": options.steps,
        "tokens": options.steps * config.train.global_batch_size * config.data.seq_len,
        "seeds": sorted({training.seed for training in wanted}),
        "jobs": options.jobs,
        "set": list(options.set),
        "fingerprint": found.fingerprint,
        "training_tokens": found.n_tokens,
        "heldout_documents": found.n_heldout,
        "machine": machine(("torch", "numpy")),
    }


def _title(training: Training, facts: dict[str, Any]) -> str:
    where, config = facts["machine"], training.config
    return (
        f"{facts['tokens']:,} tokens in {facts['steps']} steps of {config.train.global_batch_size} x "
        f"{config.data.seq_len}; {config.model.n_routed_experts} experts, {config.model.num_experts_per_tok} a token, "
        f"{len(config.model.moe_layers)} MoE layers; seeds {', '.join(map(str, facts['seeds']))}\n"
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), one thread a training, "
        f"{facts['jobs']} side by side"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
