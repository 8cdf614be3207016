"""Puts one rank together: model, engine, balancer, data, telemetry; and says how it is saved and resumed."""

import base64
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.flag import StopFlag
from cluster.process import uncollected
from data.foreign import ForeignStream
from data.stream import Stream
from launch import balance_stats
from launch.alarms import Alarm, Alarms, actions
from launch.around import in_section
from launch.config import Config
from launch.drills import Faults
from launch.feed import Feed, open_feed
from launch.going_on import leave_out, record_order, take_up_data, tell_rate
from launch.guard import Guard, Verdict
from launch.heldout import Heldout, open_heldout
from launch.rebalance import Rebalancer
from launch.resume import checkpoint_root
from launch.runfolder import RunFolder
from launch.saves import Saves
from launch.sections import Sections
from launch.speed_watch import SpeedWatch, open_watch
from launch.telemetry import Telemetry
from model.init import init_weights
from model.moe import MoE
from model.transformer import Transformer
from parallel import checkpoint, replicas, retention
from parallel.balance import Balancer
from parallel.engine import Engine, PlainEngine
from parallel.exchange import make_exchange
from parallel.gradient_watch import GradientWatch
from parallel.ownership import Identity
from parallel.ranks import Ranks
from parallel.roots import Root, committed, step_of
from parallel.saver import Saver
from parallel.weight_size import weight_sizes


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
    saves: Saves
    watch: GradientWatch
    heldout: Heldout
    tokens: int = 0
    masked: int = 0  # sequences masked because a sample was damaged, all ranks
    faults: Faults = field(default_factory=Faults)
    sections: Sections | None = None
    identity: Identity | None = None  # of the run; None where nobody asks, in benchmarks
    speed: SpeedWatch = field(default_factory=SpeedWatch)

    @property
    def stream(self) -> Stream | ForeignStream:
        """Where the batches come from."""
        return self.feed.stream

    @property
    def checkpoints(self) -> Root:
        """Where checkpoints of this run go."""
        return checkpoint_root(self.config, self.run)

    def at(self, section: str, step: int | None = None, module: torch.nn.Module | None = None) -> None:
        """A section begins: this rank's place is noted, and drills may strike. step: 1-based, None before the first."""
        if self.sections is not None:
            self.sections.mark(section, step)
        self.speed.clock.mark(section)
        self.faults.at(section, step, module=module)

    def save(self, step: int, cause: str, last: bool = False) -> None:
        """Saves the state after `step` steps, as `Saves.start` does.

        Experts whose loads ask for it go to other ranks, unless this is the last save that the run does: by way of the
        checkpoint, which is waited for then.

        Raises:
            BiasMismatchError, ReplicaMismatchError: ranks hold different values of what must be the same. A checkpoint
                has one of them: a resume would hide it.
            CheckpointError: see `Saves.start`.
        """
        if self.sections is not None:
            self.sections.mark("save", step)
        self.speed.clock.mark("save")
        with self.saves.holding():
            self._save(step, cause, last)

    def _save(self, step: int, cause: str, last: bool) -> None:
        self.saves.settle()
        self.balancer.check()
        if self.config.guard.check_replicas_every_steps:
            replicas.check(self.model, self.ranks)
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
            "guard": self.guard.state(),
            "config": asdict(self.config),
            **({"run": {"id": self.identity.id, "folder": self.identity.folder}} if self.identity else {}),
            **self.placement.manifest(table),
        }
        moves = not last and self.placement.moves(table)
        path = self.saves.start(step, cause, extra, wait=moves, needed=last, hook=self.faults.save_hook(step))
        if moves and path is not None:
            self.placement.move(table, path, step)
        else:
            self.placement.forget()

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

    def resume(self, mode: str, accepted: list[str], orders_before: int | None = None) -> int:
        """Loads the newest readable checkpoint and returns its step; 0 when there is none and `mode` allows that.

        Args:
            mode: `auto` goes back to an older checkpoint when the newest is damaged, and says so; `must` takes the
                newest or fails; `never` starts afresh.
            accepted: configuration keys whose change the user accepted. orders_before: see `going_on.take_up_data`.

        Raises:
            CheckpointError: nothing readable where something must be.
            DataError: the data is not the saved run's, and that was not accepted.
        """
        found = [] if mode == "never" else self._committed()
        errors = []
        for path in reversed(found):
            try:
                manifest = self._load(path)
            except checkpoint.CheckpointError as error:
                if mode == "must":
                    raise
                errors.append(str(error))
                self.telemetry.event("fault", cause=f"checkpoint not readable: {error}", path=str(path))
                continue
            if manifest["cursor"] is not None:  # an imported model has no place in any data
                take_up_data(self, manifest["cursor"], accepted, orders_before)
            else:
                record_order(self, manifest["step"], exact=True)
            self.telemetry.rewind(manifest["step"], cause=f"resume from {path.name}")
            tell_rate(self, manifest)
            return manifest["step"]
        if errors or mode == "must":
            detail = "; ".join(errors) or f"there is none in {self.checkpoints}"
            raise checkpoint.CheckpointError(
                f"no readable checkpoint to resume from: {detail}; give another --run to start afresh"
            )
        self.telemetry.rewind(0, cause="no checkpoint yet: starting from step 0")
        record_order(self, 0, exact=True)
        return 0

    def go_back(self, verdict: Verdict, step: int) -> int:
        """Loads an older checkpoint and leaves the data of the skipped steps out from then on; collective.

        Args:
            verdict: which asked for it. step: 0-based, the last of the skipped steps.

        Returns:
            the step to go on from: at least `guard.rollback_steps` before the first skipped one if there is such a
            checkpoint, else that of the oldest.

        Raises:
            TrainingDivergedError: there is no checkpoint. CheckpointError: it is damaged. Both on every rank.
        """
        self.saves.settle()
        stream, rollbacks = self.stream, self.guard.rollbacks
        older = [path for path in self._committed() if step_of(path) <= verdict.first]
        if not older or not isinstance(stream, Stream):
            raise self.guard.lost(step, verdict)
        far = [path for path in older if step_of(path) <= verdict.first - self.config.guard.rollback_steps]
        path = far[-1] if far else older[0]
        skipping = stream.batches.skipping(verdict.first, step - verdict.first + 1)
        target = int(self._load(path)["step"])
        self.guard.rollbacks = rollbacks
        self.guard.went_back()
        leave_out(self, skipping, target)
        if self.ranks.dp.rank == 0:
            retention.prune(self.checkpoints, 0, target, owns=_owns(self.identity))
        self.ranks.dp.barrier()
        self.telemetry.event(
            "rollback", cause=verdict.reason, step=target, from_step=step + 1, first_skipped=verdict.first + 1,
            skip_ranges=[list(skipped) for skipped in skipping.skip_ranges], rollbacks=self.guard.rollbacks,
        )  # fmt: skip
        self.telemetry.rewind(target, cause=f"went back to {path.name}: {verdict.reason}")
        return target

    def check_health(self, step: int) -> None:
        """Compares what several ranks hold, and looks at how large the weights are; collective, after `step` steps.

        Raises:
            ReplicaMismatchError: on every rank, naming the one that differs.
        """
        replicas.check(self.model, self.ranks)
        if self.config.guard.weight_growth:
            self.telemetry.alarms(self.guard.judge_weights(step, weight_sizes(self.engine, self.ranks.dp)))

    def _committed(self) -> list[Root]:
        """The checkpoints as rank 0 sees them, the same on every rank; one that was moved aside is put back before.

        Raises:
            CheckpointError: on every rank, when the storage does not answer: that is not a place without checkpoints.
        """
        told: dict[str, Any] = {"names": [], "error": ""}
        if self.ranks.dp.rank == 0:
            try:
                retention.recover(self.checkpoints)
                told["names"] = [path.name for path in committed(self.checkpoints)]
            except OSError as error:
                told["error"] = f"the checkpoints in {self.checkpoints} cannot be listed: {error}"
        first = self.ranks.dp.gather(told)[0]
        if first["error"]:
            raise checkpoint.CheckpointError(first["error"])
        return [self.checkpoints / name for name in first["names"]]

    def _load(self, path: Root) -> dict[str, Any]:
        """Takes a checkpoint's state, but for its place in the data; collective. Raises: CheckpointError everywhere."""
        saved = checkpoint.open_together(path, self.ranks.dp, self.identity)
        self.placement.start(saved.manifest)
        manifest = checkpoint.load(saved, self.engine, self.biases, self.ranks.dp)
        self.tokens = manifest["tokens"]
        self.balancer.load_state(manifest.get("balancer", {}))
        self.alarms.load_state(manifest.get("alarms", {}))
        self.guard.load_state(manifest.get("guard", {}))
        _restore_random_state(manifest["random_states"], self.ranks.dp.rank, self.ranks.dp.size, self.device)
        return manifest

    def close(self) -> None:
        """Ends background work and closes files."""
        self.saves.close()
        self.feed.close()
        self.telemetry.close()


def assemble(
    config: Config,
    run: RunFolder,
    ranks: Ranks,
    device: torch.device,
    stop: StopFlag,
    *,
    local_rank: int = 0,
    plain: bool = False,
    faults: Faults | None = None,
    sections: Sections | None = None,
    identity: Identity | None = None,
) -> Session:
    """Builds one rank's session; collective.

    Args:
        plain: torch's AdamW instead of DeepSpeed (debug launcher).
        local_rank: place on the node, for DeepSpeed.
        stop: set when a graceful stop was asked for.
        faults: drills of this rank. sections: where its place is noted. identity: of the run; rank 0's counts.
    """
    faults = faults or Faults()
    exchange = faults.wrap(make_exchange(config.parallel, ranks))
    exchange = exchange if sections is None else in_section(exchange, sections)
    model = Transformer(config.model, exchange, recompute=config.parallel.recompute)
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.label = name
    init_weights(model, config.train.seed)
    model.to(device)
    watch = GradientWatch(model)
    with uncollected():  # DeepSpeed and torch.optim import more of torch here
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
    keeping = config.checkpoint
    saver = Saver(
        checkpoint_root(config, run), engine, biases, ranks.dp, keep=keeping.keep,
        keep_every_steps=keeping.keep_every_steps, timeout_s=keeping.timeout_s, owns=_owns(identity),
    )  # fmt: skip
    return Session(
        config, run, ranks, device, model, engine, balancer, biases, feed, telemetry, Guard(config.guard), alarms,
        placement, stop, Saves(keeping, saver, telemetry), watch,
        open_heldout(config, feed, ranks.dp, device), faults=faults, sections=sections, identity=identity,
        speed=open_watch(config.telemetry, ranks, engine, device, placement, telemetry, on=not plain),
    )  # fmt: skip


def _owns(identity: Identity | None) -> Callable[[str], bool]:
    return retention.everybody if identity is None else identity.owns


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
