"""One rank of `trimtab bench scaling`: the usual training with timers around it, then a sweep of message sizes.

The timers and the forced routing are put on a session that is already built, by this entry and nothing else: there is
no configuration key with which a user could leave them on.
"""

# B batch, S seq, T = B*S tokens, E routed experts, K top-k

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.context import RankContext
from launch import worker
from launch.bench_scaling_parts import EXCHANGE, FIELDS, KINDS, OUTSIDE, SHARDING
from launch.session import Session
from model.config import ModelConfig
from model.router import Router, choose_experts
from parallel.communicator import Communicator, Traffic
from parallel.engine import Engine

# What this project and DeepSpeed call by these names of torch.distributed; the exchange of tokens is not among them.
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor",
    "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
_SWEEP_WARM_UP = 3


class Clock:
    """Where a rank's time goes, step by step, see `launch.bench_scaling_parts.split_step`.

    synchronize: waits for the device, where work on it runs on after a call has returned. On such a device calls cannot
        be timed from here: a step's exchanges are one call, other collectives count into the phase they are part of.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.synchronize = synchronize
        self.steps: list[dict[str, Any]] = []
        self._now = dict.fromkeys(FIELDS, 0.0)
        self._calls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._phase = ""

    def add(self, field: str, seconds: float) -> None:
        """Adds to the step under way."""
        self._now[field] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block's time counts as `model` or `update`."""
        self._phase = name
        started = time.perf_counter()
        try:
            yield
            if self.synchronize is not None:
                self.synchronize()
        finally:
            self._phase = ""
            self.add(name, time.perf_counter() - started)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """The block's time counts as that of collectives in the phase it falls into."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.add(f"zero_in_{self._phase}" if self._phase else "other", seconds)
            self._calls[SHARDING if self._phase else OUTSIDE].append(seconds)

    @contextmanager
    def exchange(self, traffic: Traffic) -> Iterator[None]:
        """The block waits for one transfer of the expert exchange; how long, the exchange itself counts."""
        before = traffic.exposed_seconds
        try:
            yield
        finally:
            self._calls[EXCHANGE].append(traffic.exposed_seconds - before)

    def exchanged(self, exposed_seconds: float) -> None:
        """What the exchange itself counted as standing still for all of a step's transfers."""
        self.add("all_to_all", exposed_seconds)
        if self.synchronize is not None:
            self._calls[EXCHANGE] = [exposed_seconds]

    def end_step(self) -> None:
        """The next figures are the next step's."""
        self.steps.append({**self._now, "calls": self._calls})
        self._now = dict.fromkeys(FIELDS, 0.0)
        self._calls = {kind: [] for kind in KINDS}


class MeasuredEngine:
    """An engine whose forward, backward and step are timed; everything else is the engine's own."""

    def __init__(self, engine: Engine, session: Session, clock: Clock) -> None:
        self._engine, self._session, self._clock = engine, session, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, **inputs: Any) -> Any:
        """See `Engine.forward`."""
        with self._clock.phase("model"):
            return self._engine.forward(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        with self._clock.phase("model"):
            self._engine.backward(loss, last=last)

    def step(self, lr: float) -> None:
        """See `Engine.step`; closes the clock's step."""
        with self._clock.phase("update"):
            self._engine.step(lr)
        self._end()

    def skip(self) -> None:
        """See `Engine.skip`; closes the clock's step."""
        with self._clock.phase("update"):
            self._engine.skip()
        self._end()

    def _end(self) -> None:
        self._clock.add("data", self._session.stream.wait_seconds)
        self._clock.end_step()


class _Work:
    """Something under way: waiting for it is timed, everything else is its own."""

    def __init__(self, work: Any, timer: Callable[[], AbstractContextManager[None]]) -> None:
        self._work, self._timer = work, timer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *arguments: Any, **options: Any) -> Any:
        with self._timer():
            return self._work.wait(*arguments, **options)


@contextmanager
def timed_collectives(clock: Clock) -> Iterator[None]:
    """Calls of COLLECTIVES through torch.distributed count on the clock while the block runs, in this process."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with clock.collective():
                work = call(*arguments, **options)
            return work if work is None else _Work(work, clock.collective)

        return run

    usual = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name, call in usual.items():
        setattr(dist, name, timed(call))
    try:
        yield
    finally:
        for name, call in usual.items():
            setattr(dist, name, call)


def measure(session: Session, clock: Clock) -> None:
    """Puts the clock on a session."""
    session.engine = MeasuredEngine(session.engine, session, clock)
    traffic = session.ranks.ep.traffic
    reset = traffic.reset

    def noted() -> Any:  # the train loop reads and clears a step's figures here, once
        past = reset()
        clock.exchanged(past.exposed_seconds)
        return past

    setattr(traffic, "reset", noted)  # noqa: B010  (a method of this one object)
    for communicator in (session.ranks.ep, session.ranks.nodes, session.ranks.inside):
        if communicator is not None and communicator.size > 1 and clock.synchronize is None:
            _time_transfers(communicator, clock)


def _time_transfers(communicator: Communicator, clock: Clock) -> None:
    start = communicator.start_all_to_all

    def timed(*arguments: Any, **options: Any) -> Any:
        return _Work(start(*arguments, **options), partial(clock.exchange, communicator.traffic))

    setattr(communicator, "start_all_to_all", timed)  # noqa: B010


def even_choice(n_tokens: int, seq_len: int, config: ModelConfig) -> Tensor:
    """(T, K) experts that depend on a token's place in its sequence alone; each expert has the same number of tokens
    over any E consecutive places. Tokens stay inside `topk_group` groups, as the router's do."""
    size, kept = config.n_routed_experts // config.n_group, config.topk_group
    each = -(-config.num_experts_per_tok // kept)  # choices in a group
    place = (torch.arange(n_tokens) % seq_len)[:, None]
    choice = torch.arange(config.num_experts_per_tok)
    group = (place + choice % kept * max(1, config.n_group // kept)) % config.n_group
    inside = (torch.div(place, config.n_group, rounding_mode="floor") + choice // kept * max(1, size // each)) % size
    return group * size + inside


def force_even(session: Session) -> None:
    """Every router of the session's model still chooses, and then sends tokens evenly instead."""
    batch = session.config.train.micro_batch_size

    def choose(scores: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:
        choose_experts(scores, bias, config)  # its time belongs to a step
        n_tokens = scores.shape[0]  # prediction modules see shorter sequences
        return even_choice(n_tokens, n_tokens // batch, config).to(scores.device)

    for module in session.model.modules():
        if isinstance(module, Router):
            module.choose = choose


def sweep(nbytes: Sequence[int], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of an all_to_all_single over all ranks, the slowest rank's: `repeats` for each size.

    Args:
        nbytes: what a rank sends to all others together, the same to each.
    """
    size = dist.get_world_size()
    rows = [torch.zeros(size, max(1, total // (4 * (size - 1))), device=device) for total in nbytes]
    came = [torch.empty_like(one) for one in rows]
    took = torch.zeros(len(rows), repeats, dtype=torch.float64)
    for number in range(-_SWEEP_WARM_UP, repeats):
        for place, (sent, received) in enumerate(zip(rows, came, strict=True)):
            dist.barrier()
            started = time.perf_counter()
            dist.all_to_all_single(received, sent)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 0:
                took[place, number] = time.perf_counter() - started
    moved = took.to(device)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.tolist()


def main(context: RankContext, payload: dict[str, Any]) -> dict[str, Any]:
    """`launch.worker.main` with a clock.

    Args:
        payload: that of the worker, and `bench`: even (force the routing), sweep (bytes of the messages, may be empty),
            sweep_repeats.

    Returns:
        That of the worker, and `steps` (see `split_step`), `collectives_timed`, `sweep` (seconds by size).
    """
    bench = payload["bench"]
    on_gpu = torch.cuda.is_available() and payload["config"]["cluster"]["accelerator"] != "cpu"
    clock = Clock(torch.cuda.synchronize if on_gpu else None)

    def prepare(session: Session) -> None:
        measure(session, clock)
        if bench["even"]:
            force_even(session)

    with ExitStack() as stack:
        if not on_gpu:
            stack.enter_context(timed_collectives(clock))
        result = worker.main(context, payload, prepare)
    times: list[list[float]] = []
    if bench["sweep"] and context.world_size > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        times = sweep(bench["sweep"], bench["sweep_repeats"], device)
    return {**result, "steps": clock.steps, "collectives_timed": not on_gpu, "sweep": times}
