"""Whole runs of a few steps on virtual ranks: the real train loop with data, checkpoints, guard and events."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cluster.flag import StopFlag
from data.config import DataConfig
from launch.config import CheckpointConfig, Config, TelemetryConfig, TrainConfig
from launch.guard_config import GuardConfig
from launch.runfolder import RunFolder, committed_metrics
from launch.session import Session, assemble
from launch.train import train
from parallel.checkpoint import committed, open_checkpoint
from parallel.config import BalanceConfig, OptimizerConfig, ParallelConfig
from parallel.ranks import single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks
from tests.ranks import training

KEPT = ("step", "loss", "grad_norm", "tokens_per_expert", "expert_bias", "tokens")


def tiny(data: Path, steps: int = 6, ep_size: int = 2, **sections: Any) -> Config:
    """A configuration of eight short sequences a step.

    Args:
        data: a packed dataset of bytes.
        sections: of the configuration, in place of these.
    """
    config = Config(
        model=replace(training.MODEL, vocab_size=257),
        data=DataConfig(path=str(data), seq_len=32),
        parallel=ParallelConfig(ep_size=ep_size),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=0, schedule="constant"),
        train=TrainConfig(steps=steps, global_batch_size=8, micro_batch_size=2),
        balance=BalanceConfig(rate=0.01, check_every_steps=0),
        checkpoint=CheckpointConfig(every_steps=2, keep=0),
        guard=GuardConfig(check_replicas_every_steps=1),
        telemetry=TelemetryConfig(console="off", heatmap_every_steps=1000),
    )
    return replace(config, **sections)


def play(
    config: Config, folder: Path, world_size: int = 2, prepare: Callable[[Session], None] | None = None
) -> list[dict[str, Any]]:
    """Trains or goes on in `folder`; returns what `train` gave, by rank, and raises what a rank raised.

    Args:
        prepare: called with each rank's session before it trains.
    """
    run = RunFolder(folder)
    if not run.is_run():
        run.create("")

    def work(world: Any, rank: int) -> dict[str, Any]:
        ranks = single_rank() if world_size == 1 else virtual_ranks(world, config.parallel.ep_size, rank)
        session = assemble(config, run, ranks, torch.device("cpu"), StopFlag(), plain=True)
        try:
            first = session.resume("auto", [])
            if prepare:
                prepare(session)
            return train(session, first)
        finally:
            session.close()

    with patch("launch.train.peak_flops", lambda device, precision: (1.0, "not measured")):
        return run_virtual_ranks(world_size, work)


def figures(folder: Path) -> list[dict[str, Any]]:
    """The run's committed metrics that do not depend on the clock."""
    return [{key: record[key] for key in KEPT} for record in committed_metrics(RunFolder(folder))]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    found = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["kind"] == kind]


def saved_files(folder: Path) -> dict[str, Any]:
    """Sizes and checksums of the files of every checkpoint of a run, by its name."""
    return {path.name: open_checkpoint(path).manifest["files"] for path in committed(folder / "checkpoints")}


def at_step(session: Session, act: Callable[[int], None]) -> None:
    """Has `act(step)` called, 0-based, each time before a step's data is read."""
    read = session.stream.read

    def reading(step: int) -> Any:
        act(step)
        return read(step)

    session.stream.read = reading  # type: ignore[method-assign]
