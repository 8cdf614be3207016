"""The train loop. Start reading here: one optimizer step, from the data to the checkpoint."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.stream import MicroBatch
from launch.alarms import Alarm, actions
from launch.losses import Weights, batch_balance, compute_losses, target_counts
from launch.peak import peak_flops
from launch.session import Session, memory_gib
from launch.step_stats import GlobalStats, StepStats
from launch.suspects import report_skip
from launch.telemetry import StepRecord
from model.count import flops_per_token
from model.probe import NonFiniteError
from model.routing_stats import Collect, RoutingStats
from parallel.schedule import learning_rate


def train(session: Session, first_step: int) -> dict:
    """Trains from `first_step` to the configured end, or until a stop that all ranks agree on.

    Returns:
        {"status": "done" or "stopped", "step": steps done}, the same on every rank; "requested" is true where a stop
        was asked for, by a signal or a launcher.
    """
    config, ranks, engine, balancer = session.config, session.ranks, session.engine, session.balancer
    weights = Weights(config.train.mtp_loss_weight, config.balance.seq_aux_loss_coef, config.balance.aux_loss_coef)
    meter = Meter(session)
    step = first_step
    while step < config.train.steps:
        ranks.watch.step = step + 1
        stats = StepStats()
        batches, trouble = read_step(session, step)
        agreed = agree_on_step(session, step, batches, trouble)
        if agreed.stop:
            session.save(step, cause="stop requested", last=True)
            return {"status": "stopped", "step": step, "requested": True}
        collect = Collect(balancer.wants_histogram, meter.draws(step))
        choices = BatchChoices(session, step, batches)
        for number, batch in enumerate(batches):
            batch = batch.to(session.device)
            session.watch.begin(number)
            session.at("forward", step + 1)
            with SampleNames(step, batch):
                output = engine.forward(
                    tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets, collect=collect, real=batch.real
                )
                losses = compute_losses(
                    output, batch.loss_mask, agreed.targets, agreed.sequences, weights,
                    choices.balance_loss(output.routing), batch.doc_ids,
                )  # fmt: skip
                session.at("backward", step + 1, session.model)
                engine.backward(losses.total, last=number == len(batches) - 1)
            stats.add(losses, output.routing)
            balancer.add(output.routing)
        session.speed.clock.mark("agree")
        sums = stats.reduce(ranks.dp, own_seconds=session.speed.clock.take(), traffic=ranks.ep.traffic.reset())
        session.speed.clock.mark("optimizer")
        loss = sums.losses[0] / max(1, agreed.targets[0])
        if step and session.stream.mix(step) != session.stream.mix(max(step - 1, session.stream.batches.begins)):
            session.guard.afresh()
            session.telemetry.event(
                "mix", cause="the curriculum changes the mix of the data here: the guard compares afresh", step=step + 1
            )
        verdict = session.guard.judge(step, loss, engine.grad_norm())  # the same on every rank
        lr = learning_rate(config.optimizer, engine.optimizer_steps, config.train.steps)
        bias_rate = balancer.rate(engine.optimizer_steps)
        alarms: list[Alarm] = []
        if verdict.keep:
            counts = balancer.step(engine.optimizer_steps)  # once per optimizer step
            engine.step(lr)
            session.placement.add(counts)
            alarms = session.judge_balance(step + 1, counts)
            session.telemetry.alarms(verdict.alarms)
            if verdict.reason:
                session.telemetry.event("shift", cause=verdict.reason, step=step + 1)
        else:
            counts, bias_rate = balancer.skip(), 0.0
            engine.skip()
            report_skip(session, step, verdict, {"loss": loss, "grad_norm": engine.grad_norm()}, batches)
        session.at("step", step + 1, session.model)
        session.tokens += agreed.targets[0]
        evaluated = evaluate_if_due(session, step + 1) if verdict.then == "go on" else {}
        if ranks.dp.rank == 0:
            session.run.ledger.append({**session.stream.ledger_line(step, agreed.consumed), "step": step + 1})
        extra = {
            "skipped": not verdict.keep, **session.speed.judge(step + 1, sums.own_seconds, counts),
            **session.feed.figures(), **evaluated,
        }  # fmt: skip
        session.telemetry.log_step(meter.record(step, sums, agreed, lr, bias_rate, counts, extra))
        tell_data(session, step + 1)
        if verdict.then != "go on":
            session.saves.settle()
            ranks.dp.barrier()  # the first rank to fail ends all others: rank 0 must have written why by then
            if verdict.then == "stop":
                raise session.guard.lost(step, verdict)
            step = session.go_back(verdict, step)
            continue
        if config.guard.check_replicas_every_steps and (step + 1) % config.guard.check_replicas_every_steps == 0:
            session.check_health(step + 1)
        if config.balance.check_every_steps and (step + 1) % config.balance.check_every_steps == 0:
            balancer.check()
        wanted = actions(alarms)
        if "stop" in wanted:
            session.save(step + 1, cause="an alarm stops the run", last=True)
            return {"status": "stopped", "step": step + 1}
        if step + 1 < config.train.steps:
            if (step + 1) % config.checkpoint.every_steps == 0:
                session.save(step + 1, cause=f"every {config.checkpoint.every_steps} steps")
            elif "save" in wanted:
                session.save(step + 1, cause="an alarm asks for it")
        step += 1
    if first_step < config.train.steps:
        session.save(config.train.steps, cause="end of training", last=True)
    return {"status": "done", "step": config.train.steps}


class BatchChoices:
    """How often the global batch chooses each expert, known before the gradient: what rule `aux_loss` needs, exactly.

    With one micro-step its own forward tells. With several, a forward without gradient over all of them comes first,
    which costs a third more time; counts of the micro-steps so far, the usual way out, would make the loss depend on
    how the batch is cut up.
    """

    def __init__(self, session: Session, step: int, batches: list[MicroBatch]) -> None:
        self._session = session
        self._wanted = session.config.balance.rule == "aux_loss" and bool(session.biases)
        self._counts: Tensor | None = None  # (M, E) int64
        if self._wanted and len(batches) > 1:
            with torch.no_grad():
                forwards = (self._forward(step, batch.to(session.device)) for batch in batches)
                self._counts = session.ranks.dp.all_reduce(sum(forwards, torch.zeros((), dtype=torch.int64)))

    def _forward(self, step: int, batch: MicroBatch) -> Tensor:
        with SampleNames(step, batch):
            output = self._session.engine.forward(
                tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets, real=batch.real
            )
        return output.routing.tokens_per_expert.cpu()

    def balance_loss(self, routing: RoutingStats) -> Tensor | None:
        """This micro-batch's share of the balance loss; None under other rules."""
        if not self._wanted:
            return None
        if self._counts is None:
            self._counts = self._session.ranks.dp.all_reduce(routing.tokens_per_expert.cpu().clone())
        return batch_balance(routing.score_sums, self._counts, self._session.config.model.num_experts_per_tok)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know at the start of a step: targets by depth, real tokens, sequences that hold one, hash of the
    sequences read, whether to stop."""

    targets: list[int]
    real_tokens: int
    sequences: int
    consumed: int
    stop: bool


def evaluate_if_due(session: Session, step: int) -> dict[str, Any]:
    """Held-out figures behind step `step` (1-based) for its record, empty where none are due; collective."""
    if not session.heldout.due(step):
        return {}
    found = session.heldout.measure(session.engine, session.stop, lambda: session.at("evaluate", step))
    session.speed.clock.mark("agree")
    session.ranks.ep.traffic.reset()  # what it sent is not the next step's
    session.telemetry.note(found.line(step))
    return found.record()


def tell_data(session: Session, step: int, last: bool = False) -> None:
    """Writes what plain tar files held and what was left out, once: behind the first pass, or at the run's end."""
    if news := session.feed.news(last):
        session.telemetry.event("data", step=step, **news)


def read_step(session: Session, step: int) -> tuple[list[MicroBatch], DataError | None]:
    """This rank's micro-batches, or why there are none: the others must hear of it before this rank stops."""
    try:
        session.at("data", step + 1)
        return session.stream.read(step), None
    except DataError as error:
        return [], error


def agree_on_step(session: Session, step: int, batches: list[MicroBatch], trouble: DataError | None) -> Agreement:
    """One integer all-reduce: stops, unreadable data, masked sequences and finished saves are known to all at once.

    Raises:
        DataError: on every rank, when one could not read its data or all have masked more than data.damage_budget.
    """
    depths, stream = session.config.model.num_nextn_predict_layers, session.stream
    targets = torch.zeros(depths + 1, dtype=torch.int64)
    consumed = 0
    real = torch.zeros(2, dtype=torch.int64)
    if trouble is None:
        targets = target_counts([batch.loss_mask for batch in batches], depths, [batch.doc_ids for batch in batches])
        real = torch.tensor([count_real(batch) for batch in batches], dtype=torch.int64).sum(0)
        consumed = stream.consumed_hash(step)
    own = torch.tensor(
        [
            consumed, stream.n_quarantined, int(trouble is not None), int(session.stop.is_set()),
            int(session.saves.done_here()),
        ],
        dtype=torch.int64,
    )  # fmt: skip
    session.speed.clock.mark("agree")
    agreed = session.ranks.dp.all_reduce(torch.cat((targets, real, own))).tolist()
    *total, real_tokens, sequences, consumed, masked, failed, stop, saved = agreed
    if trouble is not None:
        raise trouble
    if failed:
        raise DataError(f"{failed} of the other ranks could not read the data of step {step + 1}; they say why")
    with session.saves.holding():
        session.saves.poll(saved)
    before = session.masked
    session.masked = stream.check_damage(masked)
    if session.masked > before:
        session.telemetry.event("fault", cause="damaged samples: sequences masked", step=step + 1, total=session.masked)
    return Agreement(total, real_tokens, sequences, consumed, stop > 0)


def count_real(batch: MicroBatch) -> tuple[int, int]:
    """Real tokens of a micro-batch, and sequences that hold one."""
    if batch.real is None:
        return batch.tokens.numel(), batch.tokens.shape[0]
    return int(batch.real.sum()), int(batch.real.any(1).sum())


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
        self.steps_recorded = 0
        session.telemetry.event("peak", cause=self.peak_source, flops_per_second=round(self.peak))
        session.telemetry.open_account("starting")

    def draws(self, step: int) -> bool:
        """Whether this step's record is drawn as pictures, which need statistics of their own."""
        every = self.session.config.telemetry.heatmap_every_steps
        return self.steps_recorded == 0 or (step + 1) % every == 0

    def record(
        self, step: int, sums: GlobalStats, agreed: Agreement, lr: float, bias_rate: float, counts: Tensor,
        extra: dict[str, Any],
    ) -> StepRecord:  # fmt: skip
        """One step's record; `sums`, `agreed` and `counts` are global, `extra` are further figures."""
        session, targets = self.session, agreed.targets
        now = time.perf_counter()
        seconds, self.last = now - self.last - extra.get("evaluation_seconds", 0.0), now
        self.steps_recorded += 1
        config = session.config
        world_size = session.ranks.layout.world_size
        depths = len(targets) - 1
        mtp = sum(sums.losses[k] / max(1, targets[k]) for k in range(1, depths + 1)) / depths if depths else None
        n_layers = max(1, counts.shape[0])
        routed_tokens = counts.sum(-1).double() / config.model.num_experts_per_tok  # (M,)
        return StepRecord(
            step=step + 1,
            tokens=session.tokens,
            loss=sums.losses[0] / max(1, targets[0]),
            mtp_loss=mtp,
            sequence_balance=sums.sequence_balance / max(1, agreed.sequences) / n_layers,
            grad_norm=session.engine.grad_norm(),
            lr=lr,
            step_seconds=seconds,
            tokens_per_second=targets[0] / seconds,
            mfu=self.flops_per_token * agreed.real_tokens / seconds / (self.peak * world_size),
            memory_gib=memory_gib(session.device),
            data_wait_seconds=session.stream.wait_seconds,
            all_to_all_seconds=sums.all_to_all_seconds,
            exposed_all_to_all_seconds=sums.exposed_all_to_all_seconds,
            waiting_seconds=sums.waiting_seconds,
            bytes_sent=sums.bytes_sent,
            world_size=world_size,
            ep_size=session.ranks.layout.ep_size,
            tokens_per_expert=counts,
            expert_bias=session.balancer.bias_table(),
            bias_rate=bias_rate,
            changed_by_bias=sums.changed_by_bias,
            gate_entropy=sums.gate_entropy / routed_tokens.clamp_min(1.0),
            coactivation=sums.coactivation,
            placement=session.placement.table,
            epoch=session.stream.epoch(step),
            extra={"save_seconds": round(session.saves.take_held(), 6), **extra},
        )
