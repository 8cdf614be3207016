"""The Ray actors of one launch: placed together, started, watched and ended together."""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.context import RankContext, RankFailure
from cluster.entry import loopback_interface
from cluster.logs import LogTail, begin_log, last_lines, rank_log
from cluster.monitor import hang_of, new_watch
from cluster.ray_capacity import bundles_of, make_group, wait_for_room
from cluster.ray_nodes import is_gone
from cluster.ray_rank import RankActor
from cluster.signals import StopSignals
from cluster.worlds import Seat, seat_ranks

POLL_S = 0.1
ANSWERS_AT_ONCE = 8  # questions that an actor answers while its entry runs in a thread
SETTLE_S = 0.7  # after the first failure, for the reports of ranks that failed with it


class GangError(Exception):
    """The gang could not be started; carries the failure."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Unshared(Exception):
    """A node does not see a folder that all have to see; the entry has not started."""


def unshared_problem(shared: Sequence[Path], places: Sequence[Mapping[str, Any]]) -> str:
    """Which nodes do not see a folder that the driver wrote into, "" where all do.

    Args:
        places: of each worker, from `RankActor.where`: "missing" says why, for the log folder and each shared one.
    """
    said = []
    for number, folder in enumerate(shared, start=1):
        for place in places:
            if why := place["missing"][number]:
                said.append(f"the node {place['address']} {why.format(folder=folder)}")
    if not said:
        return ""
    return (
        f"{'; '.join(dict.fromkeys(said))}: the driver on {os.uname().nodename} wrote a file there. Every rank saves "
        "its part of a checkpoint, so use --run on storage that all nodes see and may write, or checkpoint.dir = an "
        "address (s3://...)"
    )


@dataclass
class _Worker:
    actor: Any
    report: dict | None = None
    question: Any = None  # the outstanding poll
    asked_at: float = 0.0
    lost: bool = False
    gone: bool = False  # its process has ended
    kept_log: Path | None = None  # written by this driver, where the worker's node cannot see the log folder
    place: dict = field(default_factory=dict)


class Gang:
    """The actors of one launch and the rules for ending them together."""

    def __init__(
        self,
        spec: ClusterConfig,
        log_dir: Path,
        signals: StopSignals,
        on_output: Callable[[str], None],
        use_gpu: bool,
        leave: Callable[[], str] = lambda: "",
        avoid: Sequence[str] = (),
    ) -> None:
        self.spec, self.log_dir, self.signals, self.on_output = spec, log_dir, signals, on_output
        self.use_gpu, self.leave, self.avoid = use_gpu, leave, avoid
        self.watch = new_watch(spec, log_dir)
        self.lost: list[RankFailure] = []
        self.workers: list[_Worker] = []  # by rank once `begin` has ordered them
        self._group: Any = None
        self._tail: LogTail | None = None
        self._asked_to_stop = False
        self._end_at: float | None = None
        self._deadline = time.monotonic() + spec.start_timeout_s

    @property
    def reports(self) -> list[dict | None]:
        reports: list[dict | None] = [worker.report for worker in self.workers]
        return reports or [None] * self.spec.workers

    def place(self, shared: Sequence[Path] = ()) -> None:
        """Reserves room for all workers at once, starts them and asks where they are.

        Args:
            shared: folders that every worker's node has to see and may write.

        Raises:
            Shortage, NoRoom, StoppedWaiting: there is no room. Unshared: a node does not see a folder. GangError.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spec = self.spec
        bundles, strategy = bundles_of(spec, spec.workers, self.use_gpu)
        per_node = spec.workers // len(bundles)
        self._group = make_group(bundles, strategy, self.avoid)
        wait_for_room(self._group, spec, self.use_gpu, self.signals.stop.is_set, self.on_output)
        self._deadline = time.monotonic() + spec.start_timeout_s

        rank_actor = ray.remote(RankActor)
        for number in range(spec.workers):
            strategy_here = PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=number // per_node
            )
            actor = rank_actor.options(
                num_cpus=spec.cpus_per_worker,
                num_gpus=1 if self.use_gpu else 0,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=ANSWERS_AT_ONCE,
                scheduling_strategy=strategy_here,
            ).remote()
            self.workers.append(_Worker(actor))
        name = f".seen-{secrets.token_hex(8)}"
        proofs = [folder / name for folder in (self.log_dir, *shared)]
        try:
            for proof in proofs:
                proof.parent.mkdir(parents=True, exist_ok=True)
                proof.touch()
            texts = [str(proof) for proof in proofs]
            places = self._get([w.actor.where.remote(texts) for w in self.workers], "each worker's place")
        finally:
            for proof in proofs:
                proof.unlink(missing_ok=True)
        for worker, place in zip(self.workers, places, strict=True):
            worker.place = {**place, "sees_logs": not place["missing"][0]}
        if problem := unshared_problem(shared, [worker.place for worker in self.workers]):
            raise Unshared(problem)

    def begin(self, entry: str, payload_text: str, generation: int, ep_size: int) -> None:
        """Orders the workers by node, agrees on the rendezvous and starts the entry on each."""
        seats = seat_ranks([worker.place["node_id"] for worker in self.workers], ep_size)
        self.workers = [self.workers[seat.worker] for seat in seats]
        n_nodes = 1 + max(seat.node_rank for seat in seats)
        host = "127.0.0.1" if n_nodes == 1 else self.workers[0].place["address"]
        [address] = self._get([self.workers[0].actor.hold_port.remote(host)], "the rendezvous port", ranked=True)
        begun = [begin_log(rank_log(self.log_dir, rank), rank, generation) for rank in range(len(self.workers))]
        self._tail = LogTail(rank_log(self.log_dir, 0), begun[0])
        begins = []
        for rank, (worker, seat) in enumerate(zip(self.workers, seats, strict=True)):
            context = self._context(rank, seat, n_nodes, address, generation)
            log = rank_log(self.log_dir, rank)
            if not worker.place["sees_logs"]:
                worker.kept_log = log
            where = "" if worker.kept_log else str(log)
            begins.append(
                worker.actor.begin.remote(
                    entry,
                    payload_text,
                    context.to_json(),
                    self.spec.threads_per_worker,
                    where,
                    True,
                    self.watch,
                )
            )
        paths = self._get(begins, "the start of the entry", ranked=True)
        for worker, path in zip(self.workers, paths, strict=True):
            worker.place["log"] = path

    def wait(self) -> None:
        """Returns when every rank has reported, or when those left have to be killed."""
        while any(worker.report is None and not worker.lost for worker in self.workers):
            self._ask_all()
            self._stream()
            if not self._go_on():
                return

    def end(self) -> None:
        """Takes the last output, kills the actors and gives the reservation back; safe to call at any time."""
        import ray
        from ray.util import remove_placement_group

        for worker in self.workers:
            ray.kill(worker.actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        self._wait_until_gone()
        self._stream(everything=True)

    def _context(self, rank: int, seat: Seat, n_nodes: int, address: str, generation: int) -> RankContext:
        return RankContext(
            rank=rank,
            world_size=self.spec.workers,
            local_rank=seat.local_rank,
            local_world_size=seat.local_world_size,
            node_rank=seat.node_rank,
            n_nodes=n_nodes,
            init_method=address,
            generation=generation,
            launcher="ray",
            interface=loopback_interface() if n_nodes == 1 else "auto",
            device_index=0,  # Ray shows each worker its own accelerator only
        )

    def _get(self, references: Sequence[Any], what: str, ranked: bool = False) -> list:
        """The answers to one question to every worker, within what is left of the start's time."""
        import ray

        waiting = list(references)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.2)
            missing = [number for number, reference in enumerate(references) if reference in waiting]
            if missing:
                self._check_start(what, "rank" if ranked else "worker", missing)
        answers = []
        for number, reference in enumerate(references):
            try:
                answers.append(ray.get(reference, timeout=5.0))
            except ray.exceptions.RayError as error:
                kind = "killed" if isinstance(error, ray.exceptions.RayActorError) else "start"
                raise self._start_error(number, f"asked for {what}: {_short(error)}", kind) from error
        return answers

    def _check_start(self, what: str, who: str, numbers: Sequence[int]) -> None:
        """Raises when the start has taken too long."""
        import ray

        if time.monotonic() > self._deadline:
            raise self._start_error(
                numbers[0],
                f"the driver waited {self.spec.start_timeout_s:g} s for {what} of {who} {list(numbers)}; the cluster "
                f"has {_amounts(ray.cluster_resources())}, free are {_amounts(ray.available_resources())}",
            )

    @staticmethod
    def _start_error(rank: int, message: str, kind: str = "start") -> GangError:
        return GangError(RankFailure(rank, kind, message, observed_at=time.time()))

    def _ask_all(self) -> None:
        """Collects what has been answered and asks again, without waiting for a worker that is silent."""
        import ray

        now = time.monotonic()
        for worker in self.workers:
            if worker.question is None and worker.report is None and not worker.lost:
                worker.question, worker.asked_at = worker.actor.poll.remote(), now
        asked = {worker.question: (rank, worker) for rank, worker in enumerate(self.workers) if worker.question}
        if not asked:
            return
        began = time.monotonic()
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=1.0)
        for question in answered:
            rank, worker = asked[question]
            worker.question = None
            try:
                answer = ray.get(question, timeout=5.0)
            except ray.exceptions.RayError as error:
                self._lose(rank, worker, error)
                continue
            self._keep(worker, answer["text"])
            worker.report = answer["report"]
            if worker.report and not worker.report["ok"]:
                self._fail_soon()
        for rank, worker in enumerate(self.workers):
            if worker.question and time.monotonic() - worker.asked_at > self.spec.unresponsive_s:
                worker.lost = True
                self._note(rank, "timeout", f"its worker has not answered for {self.spec.unresponsive_s:g} s")
                self._fail_soon()
        pause = POLL_S * max(1.0, len(self.workers) / 64)
        time.sleep(max(0.0, pause - (time.monotonic() - began)))

    def _lose(self, rank: int, worker: _Worker, error: Exception) -> None:
        worker.lost = worker.gone = True
        end = last_lines(rank_log(self.log_dir, rank))
        output = f"\nits last output:\n{end}" if end else ""
        if worker.kept_log:
            output += f"\nthe node {worker.place['address']} may hold more of it in {worker.place.get('log')}"
        now = time.time()
        node = worker.place.get("node_id", "")
        if hang := hang_of(self.watch, rank):
            self._note(rank, "hang", f"{hang}{output}", now)
        elif node and is_gone(node):
            self._note(rank, "node", f"its node {worker.place['address']} is gone: {_short(error)}{output}", now)
        else:
            self._note(rank, "killed", f"its worker is gone: {_short(error)}{output}", now)
        self._fail_soon()

    def _note(self, rank: int, kind: str, message: str, at: float | None = None) -> None:
        node = self.workers[rank].place.get("node_id", "")
        self.lost.append(RankFailure(rank, kind, message, observed_at=at or time.time(), node=node))

    def _fail_soon(self) -> None:
        self._ask_to_stop()
        limit = time.monotonic() + max(SETTLE_S, self.spec.failure_grace_s)
        self._end_at = min(limit, self._end_at or limit)

    def _ask_to_stop(self) -> None:
        if not self._asked_to_stop:
            self._asked_to_stop = True
            for worker in self.workers:
                worker.actor.stop.remote()

    def _go_on(self) -> bool:
        if self.signals.force.is_set():
            self._note_unfinished("was killed by a second Ctrl-C before it had stopped")
            return False
        if not self._asked_to_stop and (self.signals.stop.is_set() or self.leave()):
            self._ask_to_stop()
            self._end_at = time.monotonic() + self.spec.stop_grace_s
        if self._end_at is None or time.monotonic() < self._end_at:
            return True
        if not self.lost and not any(report and not report["ok"] for report in self.reports):
            self._note_unfinished(f"did not stop within {self.spec.stop_grace_s:g} s and was killed")
        return False

    def _note_unfinished(self, what: str) -> None:
        for rank, worker in enumerate(self.workers):
            if worker.report is None and not worker.lost:
                self._note(rank, "timeout", what)

    def _wait_until_gone(self) -> None:
        """A killed actor fails every question; until then its process may still hold memory and ports."""
        import ray

        deadline = time.monotonic() + 10.0
        for worker in self.workers:
            while not worker.gone and time.monotonic() < deadline:
                try:
                    ray.get(worker.actor.poll.remote(), timeout=1.0)
                except ray.exceptions.GetTimeoutError:
                    continue
                except ray.exceptions.RayError:
                    break
                time.sleep(0.05)

    @staticmethod
    def _keep(worker: _Worker, text: str) -> None:
        if worker.kept_log and text:
            with open(worker.kept_log, "a", encoding="utf-8") as file:
                file.write(text)

    def _stream(self, everything: bool = False) -> None:
        if self._tail and (text := self._tail.read(everything)):
            self.on_output(text)


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"


def _short(error: Exception) -> str:
    # Ray repeats the actor's whole address book after the first lines.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(lines[:3])[:600] if lines else type(error).__name__
