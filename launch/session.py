"""Puts one rank together: model, engine, balancer, data, telemetry; and says how it is saved and resumed."""

import base64
import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.flag import StopFlag
from data.foreign import ForeignStream
from data.stream import Stream
from launch import balance_stats
from launch.alarms import Alarm, Alarms, actions
from launch.config import Config
from launch.feed import Feed, open_feed
from launch.guard import Guard
from launch.rebalance import Rebalancer
from launch.runfolder import RunFolder
from launch.telemetry import Telemetry
from model.init import init_weights
from model.moe import MoE
from model.transformer import Transformer
from parallel import checkpoint
from parallel.balance import Balancer
from parallel.engine import Engine, PlainEngine
from parallel.exchange import make_exchange
from parallel.ranks import Ranks


@dataclass
class Session:
    """Everything that one rank trains with; `save` and `resume` are collective."""

    config: Config
    run: RunFolder
    ranks: Ranks
    device: torch.device
    model: Transformer
    engine: Engine
    balancer: Balancer
    biases: dict[str, Tensor]
    feed: Feed
    telemetry: Telemetry
    guard: Guard
    alarms: Alarms
    placement: Rebalancer
    stop: StopFlag
    tokens: int = 0
    masked: int = 0  # sequences masked because a sample was damaged, all ranks

    @property
    def stream(self) -> Stream | ForeignStream:
        """Where the batches come from."""
        return self.feed.stream

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints of this run go."""
        return checkpoint_root(self.config, self.run)

    def save(self, step: int, cause: str, last: bool = False) -> None:
        """Writes and publishes a checkpoint after `step` steps, then forgets those beyond `checkpoint.keep`.

        Experts whose loads ask for it go to other ranks, unless this is the last that the run does.

        Raises:
            BiasMismatchError: ranks hold different biases. Rank 0's is what is saved: a resume would hide it.
        """
        self.balancer.check()
        table = self.placement.decide()
        random_states = self.ranks.dp.gather(_random_state(self.device))
        extra = {
            "optimizer_steps": self.engine.optimizer_steps,
            "tokens": self.tokens,
            "cursor": self.stream.cursor(step),
            "fingerprint": self.feed.fingerprint,
            "layout": {
                "world_size": self.ranks.layout.world_size,
                "ep_size": self.ranks.layout.ep_size,
                "zero_stage": self.config.parallel.zero_stage,
            },
            "random_states": random_states,
            "balancer": self.balancer.state(),
            "alarms": self.alarms.state(),
            "config": asdict(self.config),
            **self.placement.manifest(table),
        }
        path = checkpoint.save(self.checkpoints, step, self.engine, self.biases, extra, self.ranks.dp)
        self.telemetry.event("save", cause=cause, step=step, path=str(path))
        if not last:
            self.placement.move(table, path, step)
        if self.ranks.dp.rank == 0:
            checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, step)

    def judge_balance(self, step: int, counts: Tensor) -> list[Alarm]:
        """Judges a kept step's loads (M, E), writes its alarms, and raises the rate where one asks for it.

        Returns:
            the alarms, the same on every rank; what else they ask for is the train loop's.
        """
        loads = balance_stats.rank_loads(counts, self.ranks.layout.ep_size, self.placement.table)
        found = self.alarms.judge(step, counts, loads)
        self.telemetry.alarms(found)
        if "raise_rate" in actions(found):
            self.balancer.raise_rate(self.engine.optimizer_steps)
        return found

    def resume(self, mode: str, accepted: list[str]) -> int:
        """Loads the newest readable checkpoint and returns its step; 0 when there is none and `mode` allows that.

        Args:
            mode: `auto` goes back to an older checkpoint when the newest is damaged, and says so; `must` takes the
                newest or fails; `never` starts afresh.
            accepted: configuration keys whose change the user accepted; a changed data order starts where the step
                lies in the new order.

        Raises:
            CheckpointError: nothing readable where something must be.
        """
        found = [] if mode == "never" else checkpoint.committed(self.checkpoints)
        errors = []
        for path in reversed(found):
            try:
                saved = checkpoint.open_checkpoint(path)
                self.placement.start(saved.manifest)
                manifest = checkpoint.load(saved, self.engine, self.biases, self.ranks.dp)
            except checkpoint.CheckpointError as error:
                if mode == "must":
                    raise
                errors.append(str(error))
                self.telemetry.event("fault", cause=f"checkpoint not readable: {error}", path=str(path))
                continue
            if not any(key.startswith("data.") or key == "train.global_batch_size" for key in accepted):
                self.stream.check_cursor(manifest["cursor"])
            self.tokens = manifest["tokens"]
            self.balancer.load_state(manifest.get("balancer", {}))
            self.alarms.load_state(manifest.get("alarms", {}))
            _restore_random_state(manifest["random_states"], self.ranks.dp.rank, self.ranks.dp.size, self.device)
            self.telemetry.rewind(saved.step, cause=f"resume from {path.name}")
            return saved.step
        if errors or mode == "must":
            detail = "; ".join(errors) or f"there is none in {self.checkpoints}"
            raise checkpoint.CheckpointError(
                f"no readable checkpoint to resume from: {detail}; give another --run to start afresh"
            )
        self.telemetry.rewind(0, cause="no checkpoint yet: starting from step 0")
        return 0

    def close(self) -> None:
        """Ends background work and closes files."""
        self.feed.close()
        self.telemetry.close()


def checkpoint_root(config: Config, run: RunFolder) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.checkpoint.dir) if config.checkpoint.dir else run.checkpoints


def assemble(
    config: Config,
    run: RunFolder,
    ranks: Ranks,
    device: torch.device,
    stop: StopFlag,
    *,
    local_rank: int = 0,
    plain: bool = False,
) -> Session:
    """Builds one rank's session; collective.

    Args:
        plain: torch's AdamW instead of DeepSpeed (debug launcher).
        local_rank: place on the node, for DeepSpeed.
        stop: set when a graceful stop was asked for.
    """
    exchange = make_exchange(config.parallel, ranks)
    model = Transformer(config.model, exchange, recompute=config.parallel.recompute)
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.label = name
    init_weights(model, config.train.seed)
    model.to(device)
    engine = build_engine(config, model, ranks, device, local_rank, plain)
    if ranks.dp.rank == 0 and not plain:
        (run.path / "deepspeed.json").write_text(json.dumps(getattr(engine, "settings", {}), indent=1) + "\n")
    biases = bias_buffers(config, model)  # after the engine, which may have moved or cast the module
    if config.train.finite_checks:
        from model.probe import attach

        attach(model)
    feed = open_feed(config, ranks.dp.rank, ranks.dp.size)
    telemetry = Telemetry.open(
        run,
        asdict(config),
        total_steps=config.train.steps,
        main=ranks.dp.rank == 0,
        console_mode=config.telemetry.console,
        heatmap_every=config.telemetry.heatmap_every_steps,
    )
    balancer = Balancer(list(biases.values()), config.balance, ranks.dp)
    names = balance_stats.layer_names(asdict(config), len(biases))
    alarms = Alarms(config.balance, names, config.model.n_routed_experts)
    placement = Rebalancer(config.balance, model, engine, ranks, telemetry)
    return Session(
        config, run, ranks, device, model, engine, balancer, biases, feed, telemetry, Guard(), alarms, placement, stop
    )


def build_engine(
    config: Config, model: Transformer, ranks: Ranks, device: torch.device, local_rank: int, plain: bool
) -> Engine:
    """DeepSpeed, or torch's AdamW in debug mode."""
    if plain:
        return PlainEngine(model, config.optimizer, ranks.layout, ranks.dp, ranks.edp, config.train.precision)
    from parallel.zero import ZeroEngine

    return ZeroEngine(
        model,
        config.optimizer,
        ranks.layout,
        stage=config.parallel.zero_stage,
        n_experts=config.model.n_routed_experts,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        accumulation_steps=config.accumulation_steps(ranks.layout.world_size),
        device=device,
        local_rank=local_rank,
    )


def bias_buffers(config: Config, model: Transformer) -> dict[str, Tensor]:
    """The routing biases by logical name, in the order of the routing statistics' rows."""
    names = [f"{layer}.mlp.gate.e_score_correction_bias" for layer in config.model.moe_layers]
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in names}


def memory_gib(device: torch.device) -> float:
    """The most memory this rank has held so far: allocated on its GPU, or resident in this process. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if device.type == "cuda":
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state(device).numpy().tobytes()).decode()
    return state


def _restore_random_state(states: list[dict[str, Any]], rank: int, world_size: int, device: torch.device) -> None:
    """Each rank takes its own state back; after a change of world size there is none that would be its own."""
    if len(states) != world_size:
        return
    state = states[rank]
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["cpu"])), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(
            torch.frombuffer(bytearray(base64.b64decode(state["cuda"])), dtype=torch.uint8), device
        )
