"""The train loop. Start reading here: one optimizer step, from the data to the checkpoint."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.errors import DataError
from data.stream import MicroBatch
from launch.losses import Weights, compute_losses, target_counts
from launch.peak import peak_flops
from launch.session import Session, memory_gib
from launch.telemetry import StepRecord
from model.count import flops_per_token
from model.probe import NonFiniteError
from parallel.schedule import learning_rate


@dataclass
class StepStats:
    """What one rank adds up over the micro-steps of a step."""

    sums: Tensor | None = None  # (1 + depths + 1,) fp64: losses by depth, sequence balance
    changed: Tensor | None = None  # (n_moe_layers,) int64 choices that the bias changed
    started: float = field(default_factory=time.perf_counter)

    def add(self, sums: Tensor, changed: Tensor) -> None:
        """Adds one micro-step."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.changed = changed if self.changed is None else self.changed + changed


def train(session: Session, first_step: int) -> dict:
    """Trains from `first_step` to the configured end, or until a stop that all ranks agree on.

    Returns:
        {"status": "done" or "stopped", "step": steps done}, the same on every rank.
    """
    config, ranks, engine, stream = session.config, session.ranks, session.engine, session.stream
    weights = Weights(config.train.mtp_loss_weight, config.balance.seq_aux_loss_coef)
    meter = Meter(session)
    for step in range(first_step, config.train.steps):
        ranks.watch.step = step + 1
        stats = StepStats()
        batches, trouble = read_step(session, step)
        agreed = agree_on_step(session, step, batches, trouble)
        if agreed.stop:
            session.save(step, cause="stop requested")
            return {"status": "stopped", "step": step}
        for number, batch in enumerate(batches):
            batch = batch.to(session.device)
            with SampleNames(step, batch):
                output = engine.forward(tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets)
                losses = compute_losses(
                    output, batch.loss_mask, agreed.targets, config.train.global_batch_size, weights
                )
                engine.backward(losses.total, last=number == len(batches) - 1)
            stats.add(losses.sums, output.routing.changed_by_bias)
            session.balancer.add(output.routing.tokens_per_expert)
        assert stats.sums is not None and stats.changed is not None
        sums = ranks.dp.all_reduce(stats.sums).tolist()
        loss = sums[0] / max(1, agreed.targets[0])
        verdict = session.guard.judge(step, loss, engine.grad_norm())  # the same on every rank
        lr = learning_rate(config.optimizer, engine.optimizer_steps, config.train.steps)
        if verdict.keep:
            engine.step(lr)
            counts = session.balancer.step()  # once per optimizer step
        else:
            engine.skip()
            counts = session.balancer.skip()
            session.telemetry.event("skip", cause=verdict.reason, step=step + 1)
        session.tokens += agreed.targets[0]
        changed = ranks.dp.all_reduce(stats.changed.cpu())
        if ranks.dp.rank == 0:
            session.run.ledger.append({**stream.ledger_line(step, agreed.consumed), "step": step + 1})
        session.telemetry.log_step(meter.record(step, stats, sums, agreed.targets, lr, counts, changed))
        if (step + 1) % config.checkpoint.every_steps == 0 and step + 1 < config.train.steps:
            session.save(step + 1, cause=f"every {config.checkpoint.every_steps} steps")
    if first_step < config.train.steps:
        session.save(config.train.steps, cause="end of training")
    return {"status": "done", "step": config.train.steps}


@dataclass(frozen=True)
class Agreement:
    """What all ranks know at the start of a step: targets by depth, hash of the sequences read, whether to stop."""

    targets: list[int]
    consumed: int
    stop: bool


def read_step(session: Session, step: int) -> tuple[list[MicroBatch], DataError | None]:
    """This rank's micro-batches, or why there are none: the others must hear of it before this rank stops."""
    try:
        return session.stream.read(step), None
    except DataError as error:
        return [], error


def agree_on_step(session: Session, step: int, batches: list[MicroBatch], trouble: DataError | None) -> Agreement:
    """One integer all-reduce: stops, unreadable data and masked sequences are known to all at the same step.

    Raises:
        DataError: on every rank, when one could not read its data or all have masked more than data.damage_budget.
    """
    depths, stream = session.config.model.num_nextn_predict_layers, session.stream
    targets = torch.zeros(depths + 1, dtype=torch.int64)
    consumed = 0
    if trouble is None:
        targets = target_counts([batch.loss_mask for batch in batches], depths)
        consumed = stream.consumed_hash(step)
    own = torch.tensor(
        [consumed, stream.n_quarantined, int(trouble is not None), int(session.stop.is_set())], dtype=torch.int64
    )
    *total, consumed, masked, failed, stop = session.ranks.dp.all_reduce(torch.cat((targets, own))).tolist()
    if trouble is not None:
        raise trouble
    if failed:
        raise DataError(f"{failed} of the other ranks could not read the data of step {step + 1}; they say why")
    before = session.masked
    session.masked = stream.check_damage(masked)
    if session.masked > before:
        session.telemetry.event("fault", cause="damaged samples: sequences masked", step=step + 1, total=session.masked)
    return Agreement(total, consumed, stop > 0)


class SampleNames:
    """Adds step and sample ids to the error when a tensor was found not to be finite."""

    def __init__(self, step: int, batch: MicroBatch) -> None:
        self.step = step
        self.batch = batch

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NonFiniteError):
            error.add_note(f"in step {self.step + 1}, sample ids {self.batch.sequence_ids.tolist()}")


class Meter:
    """Turns a step's sums into the record that telemetry writes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.flops_per_token = flops_per_token(session.config.model, session.config.data.seq_len)
        self.peak, self.peak_source = peak_flops(session.device, session.config.train.precision)
        self.last = time.perf_counter()
        session.telemetry.event("peak", cause=self.peak_source, flops_per_second=round(self.peak))

    def record(
        self,
        step: int,
        stats: StepStats,
        sums: list[float],
        targets: list[int],
        lr: float,
        counts: Tensor,
        changed: Tensor,
    ) -> StepRecord:
        """One step's record; `sums` and `targets` are global."""
        session = self.session
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        world_size = session.ranks.layout.world_size
        traffic = session.ranks.ep.traffic.reset()
        depths = len(targets) - 1
        mtp = sum(sums[k] / max(1, targets[k]) for k in range(1, depths + 1)) / depths if depths else None
        positions = session.config.train.global_batch_size * session.config.data.seq_len
        return StepRecord(
            step=step + 1,
            tokens=session.tokens,
            loss=sums[0] / max(1, targets[0]),
            mtp_loss=mtp,
            sequence_balance=sums[-1] / session.config.train.global_batch_size / max(1, counts.shape[0]),
            grad_norm=session.engine.grad_norm(),
            lr=lr,
            step_seconds=seconds,
            tokens_per_second=targets[0] / seconds,
            mfu=self.flops_per_token * positions / seconds / (self.peak * world_size),
            memory_gib=memory_gib(session.device),
            data_wait_seconds=session.stream.wait_seconds,
            all_to_all_seconds=traffic.seconds,
            exposed_all_to_all_seconds=traffic.exposed_seconds,
            world_size=world_size,
            ep_size=session.ranks.layout.ep_size,
            tokens_per_expert=counts,
            expert_bias=session.balancer.bias_table(),
            changed_by_bias=changed,
            epoch=session.stream.epoch(step),
        )
