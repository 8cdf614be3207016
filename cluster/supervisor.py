"""Runs a gang of ranks again after it has failed: what is tried again, how often, after which wait, in which size.

A failure stops the whole gang; the next generation starts from the newest committed checkpoint. The policy is a pure
state machine (`History`), the loop around it (`supervise`) knows no launcher, no clock and no file.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.causes import NO_NAMES, Cause, Names, Place, cause_of, first_cause
from cluster.context import EXIT_FAILED, EXIT_STOPPED, STOPPED, LaunchResult, RankFailure
from cluster.flag import StopFlag

SAME_PLACE = 3  # failures in a row in one step (or section before the first step) that end the run
MORE_WORKERS = "more workers"  # the cause of a restart that grows the world
NO_FILE = "[Errno 2]"  # ENOENT in the message of an OSError
LOOK_S = 1.0  # between two looks at what a cluster can place


@dataclass(frozen=True)
class Policy:
    """How a failed run is taken up again.

    workers: ranks that were asked for. min_workers: fewer than these do not run.
    restarts: of each cause, without a new committed checkpoint between them; 0 never restarts. What numbers did is done
    again once at most: the same data and weights give the same numbers, unless the machine was at fault.
    backoff_s: wait before a restart, doubled with each of the same cause, up to backoff_max_s.
    wait_for_nodes_s: how long a cluster may take to get back to `workers` before the run goes on with fewer.
    """

    workers: int
    min_workers: int = 1
    restarts: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    wait_for_nodes_s: float = 60.0


@dataclass(frozen=True)
class Verdict:
    """again: whether to restart, after backoff_s. reason: why not, in a word, see LaunchResult; text: for people."""

    again: bool
    reason: str = ""
    text: str = ""
    backoff_s: float = 0.0


class History:
    """Counts failures by cause and by place; a newly committed checkpoint clears the counts."""

    def __init__(self, policy: Policy, committed: int = 0) -> None:
        self.policy = policy
        self._used: Counter[str] = Counter()
        self._committed = committed
        self._place: object = None
        self._in_place = 0

    def judge(self, cause: Cause, place: Place, committed: int) -> Verdict:
        """What to do after a failure.

        Args:
            cause: why. place: where the rank was that failed first. committed: step of the newest checkpoint, 0: none.
        """
        if cause == "user_error":
            return Verdict(False, "user_error")
        if committed > self._committed:
            self._used.clear()
        self._committed = committed
        if cause not in ("node", "preemption"):  # these come from outside, wherever the run is
            where = place.section if place.is_starting else place.step
            self._in_place = self._in_place + 1 if where == self._place else 1
            self._place = where
            if self._in_place >= SAME_PLACE:
                return Verdict(False, "poison", f"it failed {self._in_place} times in a row in {place}")
        self._used[cause] += 1
        used, budget = self._used[cause], self.policy.restarts
        if cause == "numeric":
            budget = min(budget, 1)
        if used > budget:
            text = f"no new checkpoint after {budget} restarts because of {cause!r}" if budget else ""
            return Verdict(False, "restarts", f"{text} (cluster.restarts = {self.policy.restarts})".strip())
        return Verdict(True, backoff_s=min(self.policy.backoff_max_s, self.policy.backoff_s * 2.0 ** (used - 1)))


class Pool(Protocol):
    """Where ranks can be placed."""

    def available(self) -> int | None:
        """How many ranks can be placed now; None where that is not for the launcher to know."""
        ...

    def blame(self, failure: RankFailure) -> None:
        """Notes that a node has failed, so that one which fails again is avoided."""
        ...

    def leaving(self) -> str:
        """Why the ranks should leave their nodes now, "" when they may stay; asked while they run."""
        ...

    def order(self, workers: int) -> None:
        """Asks for room for so many workers beside those that run, which has an autoscaler start nodes; 0 withdraws."""
        ...


class OneMachine:
    """The pool of a launcher that starts everything on this machine."""

    def available(self) -> int | None:
        """Not known: what was asked for is what is tried."""
        return None

    def blame(self, failure: RankFailure) -> None:
        """There is no other machine."""

    def leaving(self) -> str:
        """A notice for this machine is a signal to the launcher."""
        return ""

    def order(self, workers: int) -> None:
        """Nobody adds machines."""


@dataclass(frozen=True)
class Generation:
    """What a launch is told. number 0 is the first start. recovery: why and when the one before ended, JSON-able."""

    number: int
    workers: int
    recovery: dict[str, Any] | None = None
    leave: Callable[[], str] = lambda: ""  # asked now and then; a reason why the ranks should save and stop, or ""


@dataclass
class Surroundings:
    """What `supervise` needs of the run it restarts.

    committed: step of the newest checkpoint, 0 when there is none.
    place: where a rank of this generation was; None asks for the one that came furthest.
    legal: the largest number of ranks, at most this, that the configuration can run on; None when there is none.
    event: writes an event (kind, cause and more). poison: called with the place that failed too often; returns what it
    has kept of it, for people.
    say: one line for people. names: exceptions whose cause is known by their class.
    """

    committed: Callable[[], int]
    place: Callable[[int, int | None], Place]
    legal: Callable[[int], int | None]
    event: Callable[..., object]
    poison: Callable[[Place], str] = lambda place: ""
    say: Callable[[str], None] = lambda text: None
    names: Names = NO_NAMES


def supervise(
    launch: Callable[[Generation], LaunchResult],
    policy: Policy,
    around: Surroundings,
    stop: StopFlag,
    pool: Pool | None = None,
    clock: Callable[[], float] = time.time,
    wait: Callable[[float], bool] | None = None,
) -> LaunchResult:
    """Launches until a generation is done, was stopped on request, or must not be tried again.

    Args:
        launch: starts one generation and returns when all of it has ended.
        stop: set when somebody asked for a stop; then nothing is started any more.
        clock: seconds of the wall clock, for the times in events.
        wait: waits so many seconds, returns early and true when stop is set.

    Returns:
        The last generation's result. A stop between two generations is one on request: status 75 where a checkpoint
        is committed.
    """
    supervisor = _Supervisor(policy, around, stop, pool or OneMachine(), clock, wait or stop.wait)
    generation = Generation(0, policy.workers, leave=supervisor.leave)
    while True:
        supervisor.begin(generation)
        result = launch(generation)
        following = supervisor.follow(generation, result)
        if isinstance(following, LaunchResult):
            return following
        generation = following


class _Supervisor:
    """The state of one `supervise`."""

    def __init__(
        self,
        policy: Policy,
        around: Surroundings,
        stop: StopFlag,
        pool: Pool,
        clock: Callable[[], float],
        wait: Callable[[float], bool],
    ) -> None:
        self.policy, self.around, self.stop, self.pool, self.clock, self.wait = policy, around, stop, pool, clock, wait
        self.history = History(policy, around.committed())
        self._workers = policy.workers
        self._left = ""
        self._looked_at = 0.0

    def begin(self, generation: Generation) -> None:
        self._workers, self._left, self._looked_at = generation.workers, "", time.monotonic()

    def leave(self) -> str:
        """Why the ranks should save and stop now: a drain notice, or room for a larger world."""
        if not self._left and time.monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = time.monotonic()
            self._left = self.pool.leaving()
            self.pool.order(self.policy.workers - self._workers)
            if not self._left and self._workers < self.policy.workers and self._best() > self._workers:
                self._left = MORE_WORKERS
        return self._left

    def follow(self, generation: Generation, result: LaunchResult) -> LaunchResult | Generation:
        """The next generation, or the end."""
        ended = self.clock()
        if result.exit_code == 0 or (self.stop.is_set() and result.exit_code == EXIT_STOPPED):
            return result
        judged = self._judge(generation, result, ended)
        if judged is None:
            return replace(result, generation=generation.number)
        facts, place, verdict = judged
        if self.stop.is_set():  # a failure on the way out
            slow = any(failure.kind == "timeout" for failure in result.failures)
            keep = replace(result, generation=generation.number)
            return keep if slow or facts["cause"] == "user_error" else self._stopped(generation, result)
        if not verdict.again:
            return self._give_up(generation, result, place, verdict)
        self.around.say(_announce(facts, place, verdict))
        if verdict.backoff_s and self.wait(verdict.backoff_s):
            return self._stopped(generation, result)
        workers = self._size()
        if self.stop.is_set() or (workers is None and facts["cause"] == "preemption"):
            return self._stopped(generation, result)
        if workers is None:
            text = (
                f"within {self.policy.wait_for_nodes_s:g} s the cluster got no room for a legal number of workers "
                f"from cluster.min_workers = {self.policy.min_workers} to {self.policy.workers}"
            )
            return self._give_up(generation, result, place, Verdict(False, "capacity", text))
        now = self.clock()
        number = generation.number + 1
        self.around.event(
            "restart",
            **{key: value for key, value in facts.items() if key != "observed_at"},
            generation=number,
            step=self.around.committed(),
            workers=workers,
            seconds_teardown=round(max(0.0, ended - facts["observed_at"]), 3),
            seconds_waiting=round(now - ended, 3),
        )
        recovery = {"cause": facts["cause"], "observed_at": facts["observed_at"], "ended_at": ended, "launched_at": now}
        return Generation(number, workers, recovery, self.leave)

    def _judge(
        self, generation: Generation, result: LaunchResult, ended: float
    ) -> tuple[dict[str, Any], Place, Verdict] | None:
        """The facts for the event, where it happened and what to do; None when the result stands as it is."""
        committed = self.around.committed()
        if result.exit_code == EXIT_STOPPED:
            if not any(one and one.get("status") == STOPPED and one.get("requested") for one in result.results):
                return None  # an alarm stopped it
            place = self.around.place(generation.number, None)
            if self._left == MORE_WORKERS:
                return {"cause": MORE_WORKERS, "observed_at": ended, "message": "nodes are back"}, place, Verdict(True)
            facts = {"cause": "preemption", "observed_at": ended, "message": self._left or "a rank was asked to stop"}
            return facts, place, self.history.judge("preemption", place, committed)
        if not result.failures:
            if generation.number == 0:
                return None  # refused before anything started
            place = self.around.place(generation.number, None)
            facts = {"cause": "node", "observed_at": ended, "message": _short(result.error)}
            return facts, place, self.history.judge("node", place, committed)
        failure = first_cause(result.failures)
        place = self.around.place(generation.number, failure.rank)
        cause = cause_of(failure, place, self.around.names)
        if cause in ("worker", "node", "hang"):
            self.pool.blame(failure)
        facts = {
            "cause": cause,
            "observed_at": failure.observed_at or ended,
            "rank": failure.rank,
            "signal": failure.signal,
            "section": place.section,
            "failed_step": place.step,
            "message": _short(failure.message),
        }
        if failure.exception:
            facts["exception"] = failure.exception[0]
        if failure.node:
            facts["node"] = failure.node
        if place.seen_at and failure.observed_at:
            facts["seconds_detection"] = round(max(0.0, failure.observed_at - place.seen_at), 3)
        if cause == "storage" and not committed and NO_FILE in failure.message:
            text = (
                "no save has succeeded, and the folder is missing for a rank; starting again would lose the same steps"
            )
            return facts, place, Verdict(False, "storage", text)
        return facts, place, self.history.judge(cause, place, committed)

    def _give_up(self, generation: Generation, result: LaunchResult, place: Place, verdict: Verdict) -> LaunchResult:
        text = verdict.text
        if verdict.reason == "poison" and (more := self.around.poison(place)):
            text += f"; {more}"
        error = result.error + (f"\nnot started again: {text}" if text else "")
        code = EXIT_FAILED if result.exit_code == EXIT_STOPPED else result.exit_code
        return replace(result, exit_code=code, error=error, generation=generation.number, reason=verdict.reason)

    def _stopped(self, generation: Generation, result: LaunchResult) -> LaunchResult:
        """A stop while nothing runs: clean where a checkpoint holds what was done."""
        step = self.around.committed()
        if not step:
            error = f"{result.error}\nstopped on request before there was any checkpoint"
            return replace(result, exit_code=EXIT_FAILED, error=error, generation=generation.number)
        self.around.event("stop", cause="stopped", step=step, message="asked for between two generations")
        results: list[dict | None] = [{"status": STOPPED, "step": step}]
        return LaunchResult(EXIT_STOPPED, results, "stopped on request", generation=generation.number)

    def _best(self) -> int:
        free = self.pool.available()
        if free is None:
            return self.policy.workers
        return self.around.legal(min(free, self.policy.workers)) or 0

    def _size(self) -> int | None:
        """How many workers the next generation gets; waits for nodes to come back before it takes fewer."""
        waited = 0.0
        while True:
            best = self._best()
            if best >= self.policy.workers:
                return self.policy.workers
            self.pool.order(self.policy.workers)
            if waited >= self.policy.wait_for_nodes_s:
                return best if best >= max(1, self.policy.min_workers) else None
            pause = min(LOOK_S, self.policy.wait_for_nodes_s - waited)
            if self.wait(pause):
                return None
            waited += pause


def _announce(facts: dict[str, Any], place: Place, verdict: Verdict) -> str:
    first = str(facts.get("message", "")).strip().splitlines()[:1]
    who = f"rank {facts['rank']} failed in {place}" if facts.get("rank") is not None else f"stopped in {place}"
    when = f"in {verdict.backoff_s:g} s" if verdict.backoff_s else "now"
    return f"{who} ({facts['cause']}): {first[0] if first else 'no message'}; starting again {when}"


def _short(text: str) -> str:
    """The first and last words of a message: enough for an event, whole in the log."""
    return text if len(text) <= 4000 else f"{text[:2000]}\n...\n{text[-2000:]}"
