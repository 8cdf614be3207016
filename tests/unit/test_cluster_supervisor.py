"""What is tried again, how often, after which wait and in which size: launches, clock and nodes are made up."""

import time

import pytest

from cluster.causes import Place
from cluster.context import LaunchResult, RankFailure
from cluster.flag import StopFlag
from cluster.supervisor import Generation, History, Policy, Surroundings, supervise

DONE = LaunchResult(0, [{"status": "done", "step": 9}])


def killed(rank: int = 1, at: float = 0.0) -> LaunchResult:
    return LaunchResult(1, [None], "killed", (RankFailure(rank, "killed", "gone", 9, observed_at=at),))


class Run:
    """A made-up run: `script` is one (result, step reached, step committed) for each generation."""

    def __init__(self, script: list, policy: Policy, free: list[int] | None = None, legal=lambda limit: limit) -> None:
        self.script, self.stop, self.told, self.generations = script, StopFlag(), [], []
        self.waits: list[float] = []
        self.ordered: list[int] = []
        self.free, self.now, self.committed, self.place = free, 100.0, 0, Place()
        around = Surroundings(
            committed=lambda: self.committed,
            place=lambda generation, rank: self.place,
            legal=legal,
            event=lambda kind, **fields: self.told.append((kind, fields)),
            poison=lambda place: f"samples of {place.step}",
        )
        self.result = supervise(self.launch, policy, around, self.stop, self, lambda: self.now, self.wait)

    def launch(self, generation: Generation) -> LaunchResult:
        self.generations.append(generation)
        result, step, self.committed = self.script[min(generation.number, len(self.script) - 1)]
        self.place = Place("forward", step) if step else Place()
        self.now += 10
        return result

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return self.stop.is_set()

    def available(self) -> int | None:
        if self.free is None:
            return None
        return self.free.pop(0) if len(self.free) > 1 else self.free[0]

    def blame(self, failure: RankFailure) -> None:
        self.told.append(("blame", {"rank": failure.rank}))

    def leaving(self) -> str:
        return ""

    def order(self, workers: int) -> None:
        self.ordered.append(workers)

    def restarts(self) -> list[dict]:
        return [fields for kind, fields in self.told if kind == "restart"]


POLICY = Policy(workers=4, restarts=3, backoff_s=1.0, backoff_max_s=3.0, wait_for_nodes_s=5.0)


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint() -> None:
    run = Run([(killed(at=107.0), 5, 4), (DONE, 9, 9)], POLICY)
    assert run.result.exit_code == 0
    [event] = run.restarts()
    assert {key: event[key] for key in ("cause", "signal", "rank", "generation", "step", "failed_step", "workers")} == {
        "cause": "worker", "signal": 9, "rank": 1, "generation": 1, "step": 4, "failed_step": 5, "workers": 4,
    }  # fmt: skip
    assert (event["seconds_teardown"], event["seconds_waiting"]) == (3.0, 1.0)
    assert run.generations[0].recovery is None
    assert run.generations[1].recovery == {
        "cause": "worker",
        "observed_at": 107.0,
        "ended_at": 110.0,
        "launched_at": 111.0,
    }


def test_the_same_step_three_times_ends_the_run() -> None:
    run = Run([(killed(), 5, 4)], POLICY)
    assert (run.result.exit_code, run.result.reason, run.result.generation) == (1, "poison", 2)
    assert "it failed 3 times in a row in step 5; samples of 5" in run.result.error
    assert len(run.restarts()) == 2


def test_ever_later_steps_go_on_as_long_as_checkpoints_are_made() -> None:
    script = [(killed(), step + 1, step) for step in range(1, 30)] + [(DONE, 40, 40)]
    run = Run(script, POLICY)
    assert run.result.exit_code == 0 and len(run.restarts()) == 29
    assert set(run.waits) == {1.0}  # the wait starts anew with each checkpoint


def test_ever_later_steps_without_a_checkpoint_use_the_budget_up() -> None:
    run = Run([(killed(), step, 0) for step in range(1, 9)], POLICY)
    assert (run.result.exit_code, run.result.reason) == (1, "restarts")
    assert len(run.restarts()) == 3 and run.waits == [1.0, 2.0, 3.0]
    assert "no new checkpoint after 3 restarts because of 'worker' (cluster.restarts = 3)" in run.result.error


def test_budgets_are_separate_and_numbers_get_one_more_try() -> None:
    history = History(POLICY)
    causes = ["worker", "storage", "worker", "storage", "worker", "storage", "numeric", "numeric", "storage"]
    verdicts = [history.judge(cause, Place("step", n), 0).again for n, cause in enumerate(causes, start=1)]
    assert verdicts == [True] * 7 + [False] * 2


def test_places_before_the_first_step_count_too_but_not_what_comes_from_outside() -> None:
    history = History(POLICY)
    assert [history.judge("worker", Place("start"), 0).again for _ in range(3)] == [True, True, False]
    history = History(Policy(4, restarts=9))
    assert all(history.judge("preemption", Place("forward", 5), 0).again for _ in range(5))


@pytest.mark.parametrize("restarts", [0, 3])
def test_mistakes_are_never_tried_again(restarts: int) -> None:
    mistake = LaunchResult(1, [None], "whole text", (RankFailure(0, "exception", "x", exception=("TypeError",)),))
    run = Run([(mistake, 0, 0)], Policy(4, restarts=restarts))
    assert (run.result.exit_code, run.result.reason, run.result.error) == (1, "user_error", "whole text")
    assert not run.restarts()


def test_no_restarts_where_none_are_wanted() -> None:
    run = Run([(killed(), 5, 4)], Policy(4, restarts=0))
    assert (run.result.reason, run.restarts()) == ("restarts", [])


def test_a_refusal_before_anything_ran_stands() -> None:
    refused = LaunchResult(2, [None], "too many workers")
    assert Run([(refused, 0, 0)], POLICY).result.exit_code == 2


def test_it_waits_for_nodes_then_takes_the_largest_legal_world() -> None:
    lost = LaunchResult(1, [None], "lost", (RankFailure(3, "node", "gone", node="n3"),))
    even = lambda limit: limit // 2 * 2 or None  # noqa: E731
    run = Run([(lost, 5, 4), (DONE, 9, 9)], POLICY, free=[3], legal=even)
    [event] = run.restarts()
    assert (event["cause"], event["workers"], event["node"]) == ("node", 2, "n3")
    assert sum(run.waits) == 1.0 + 5.0 and ("blame", {"rank": 3}) in run.told
    back = Run([(lost, 5, 4), (DONE, 9, 9)], POLICY, free=[3, 3, 4], legal=even)
    assert back.restarts()[0]["workers"] == 4 and sum(back.waits) == 1.0 + 2.0


def test_too_few_nodes_for_any_legal_world_end_the_run() -> None:
    lost = LaunchResult(1, [None], "lost", (RankFailure(3, "node", "gone"),))
    for free, policy in ((1, POLICY), (3, Policy(4, min_workers=4, wait_for_nodes_s=5.0))):
        run = Run([(lost, 5, 4)], policy, free=[free], legal=lambda limit: limit // 2 * 2 or None)
        assert (run.result.exit_code, run.result.reason, run.restarts()) == (1, "capacity", [])


def test_it_grows_back_at_a_checkpoint() -> None:
    stopped = LaunchResult(75, [{"status": "stopped", "step": 6, "requested": True}], "stopped by its own decision")
    lost = LaunchResult(1, [None], "lost", (RankFailure(3, "node", "gone"),))

    class Growing(Run):
        def launch(self, generation: Generation) -> LaunchResult:
            result = super().launch(generation)
            if result is stopped:
                self.free = [4]
                import cluster.supervisor as module

                before, module.LOOK_S = module.LOOK_S, 0.0
                try:
                    assert generation.leave() == "more workers"
                finally:
                    module.LOOK_S = before
            return result

    run = Growing([(lost, 5, 4), (stopped, 6, 6), (DONE, 9, 9)], POLICY, free=[2])
    assert [(event["cause"], event["workers"]) for event in run.restarts()] == [("node", 2), ("more workers", 4)]
    assert run.result.exit_code == 0


def test_a_stop_that_nobody_asked_the_driver_for_is_a_preemption_unless_an_alarm_wanted_it() -> None:
    asked = LaunchResult(75, [{"status": "stopped", "step": 4, "requested": True}])
    run = Run([(asked, 5, 4), (DONE, 9, 9)], POLICY)
    assert [event["cause"] for event in run.restarts()] == ["preemption"]
    alarm = LaunchResult(75, [{"status": "stopped", "step": 4}])
    assert Run([(alarm, 5, 4)], POLICY).result.exit_code == 75


@pytest.mark.parametrize(("committed", "code"), [(4, 75), (0, 1)])
def test_a_stop_during_the_wait_is_clean_where_a_checkpoint_is(committed: int, code: int) -> None:
    class Stopped(Run):
        def wait(self, seconds: float) -> bool:
            self.stop.set()
            return super().wait(seconds)

    run = Stopped([(killed(), 5, committed)], POLICY)
    assert run.result.exit_code == code and len(run.generations) == 1
    assert [kind for kind, _ in run.told if kind == "stop"] == ["stop"] * bool(committed)
    if committed:
        assert run.result.results == [{"status": "stopped", "step": 4}]


def test_a_failure_while_stopping_keeps_its_status_only_where_the_stop_took_too_long() -> None:
    class Stopping(Run):
        def launch(self, generation: Generation) -> LaunchResult:
            self.stop.set()
            return super().launch(generation)

    slow = LaunchResult(1, [None], "late", (RankFailure(0, "timeout", "did not stop"),))
    assert Stopping([(slow, 5, 4)], POLICY).result.exit_code == 1
    assert Stopping([(killed(), 5, 4)], POLICY).result.exit_code == 75


def test_a_save_that_never_succeeded_for_want_of_a_folder_is_not_tried_again() -> None:
    message = "3 saves in a row have failed: [Errno 2] No such file or directory: '/runs/x/step.tmp/rank-00001'"
    failure = RankFailure(1, "exception", message, exception=("FileNotFoundError", "OSError"))
    failed = LaunchResult(1, [None] * 4, "no folder", (failure,))
    run = Run([(failed, 6, 0), (LaunchResult(0, [{}] * 4), 9, 9)], POLICY)
    assert (len(run.generations), run.result.exit_code, run.result.reason) == (1, 1, "storage")
    assert "no save has succeeded" in run.result.error
    run = Run([(failed, 6, 4), (LaunchResult(0, [{}] * 4), 9, 9)], POLICY)
    assert len(run.generations) == 2, "a folder that was there may come back"


def test_missing_workers_are_ordered_while_waiting_and_while_fewer_run() -> None:
    failure = RankFailure(1, "node", "gone")
    lost = LaunchResult(1, [None] * 4, "gone", (failure,))

    class Watching(Run):
        def launch(self, generation: Generation) -> LaunchResult:
            if generation.number:
                time.sleep(1.1)  # longer than LOOK_S
                generation.leave()
            return super().launch(generation)

    run = Watching([(lost, 6, 4), (LaunchResult(0, [{}] * 2), 9, 9)], POLICY, free=[2])
    assert [one.workers for one in run.generations] == [4, 2]
    assert run.ordered[0] == 4 and run.ordered[-1] == 2


def test_a_cluster_that_stayed_busy_is_not_asked_again_at_once() -> None:
    busy = LaunchResult(1, [None] * 4, "the driver waited 120 s for room", reason="capacity")
    run = Run([(busy, 0, 0)], POLICY)
    assert (len(run.generations), run.result.reason) == (1, "capacity")
