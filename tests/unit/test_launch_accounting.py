"""Where a run's time went: every millisecond is of one kind, whatever happened, and clocks that jump change nothing."""

import random
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from launch.accounting import KINDS, Account, Running, account, in_words, read_account
from launch.launches import launches_of
from launch.report import summarize, write_report
from launch.runfolder import RunFolder

HOUR = 3600.0


class Story:
    """Records as the launcher ("driver") and rank 0 of each generation would write them; `now` is the true time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall_error = 0.0
        self.events: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self._opened: dict[str, float] = {}
        self._last = 0.0
        self._number = 0

    def wait(self, seconds: float) -> "Story":
        self.now += seconds
        return self

    def _stamp(self, process: str) -> dict[str, Any]:
        opened = self._opened.setdefault(process, self.now)
        wall = datetime.fromtimestamp(1.7e9 + self.now + self.wall_error, UTC).isoformat(timespec="milliseconds")
        return {"time": wall, "seconds": round(self.now - opened, 3), "process": process}

    def event(self, process: str, kind: str, cause: str = "x", **fields: Any) -> "Story":
        self.events.append({**self._stamp(process), "kind": kind, "cause": cause, **fields})
        return self

    def launch(self, before: float = 2.0) -> "Story":
        self._number += 1
        self.wait(before).event(self.driver, "launch", seconds_before=before)
        return self

    @property
    def driver(self) -> str:
        return f"driver-{self._number}"

    def start(self, rank: str, after: float = 10.0, until_first: float = 1.0) -> "Story":
        """Rank 0 comes up; then loading, until the first step begins."""
        self.wait(after).event(rank, "start").wait(until_first)
        self._last = self.now
        return self.event(rank, "peak")

    def steps(self, rank: str, *numbers: int, took: float = 1.0, saved: float = 0.0, **more: Any) -> "Story":
        for number in numbers:
            self.wait(took + saved)
            line = {"step": number, **self._stamp(rank), "step_seconds": self.now - self._last,
                    "data_wait_seconds": 0.0, "save_seconds": saved, **more}  # fmt: skip
            self.lines.append((len(self.lines) * 100, line))
            self._last = self.now
        return self

    def restart(self, step: int, cause: str = "worker", seconds: tuple[float, float, float] = (0.5, 0.25, 1.0)) -> None:
        """The launcher noticed, cleared away and waited; the ranks start again from `step`."""
        detection, teardown, waiting = seconds
        self.wait(sum(seconds))
        self.event(self.driver, "restart", step=step, seconds_detection=detection, seconds_teardown=teardown,
                   seconds_waiting=waiting, cause=cause)  # fmt: skip

    def rewind(self, rank: str, step: int) -> "Story":
        return self.event(rank, "rewind", step=step, metrics_bytes=len(self.lines) * 100)

    def end(self, rank: str, saving: float = 0.5, closing: float = 1.5, status: int = 0) -> "Story":
        self.wait(saving).event(rank, "stop", step=0, seconds_saving=saving)
        return self.wait(closing).event(self.driver, "end", exit_status=status)

    def account(self) -> Account:
        found = account(launches_of(self.events, self.lines))
        assert found is not None
        check(found)
        return found


def check(found: Account) -> None:
    """What holds for every account: spans lie end to end, and the kinds sum to the wall time exactly."""
    for timeline in found.timelines:
        borders = [0] + [span.ended for span in timeline.spans]
        assert [span.began for span in timeline.spans] == borders[:-1]
        assert all(span.ended > span.began for span in timeline.spans)
    figures = found.figures()
    assert sum(Decimal(str(figures[f"{kind}_seconds"])) for kind in KINDS) == Decimal(str(figures["wall_seconds"]))


def seconds(found: Account) -> dict[str, float]:
    return {kind: found.milliseconds[kind] / 1e3 for kind in KINDS if found.milliseconds[kind]}


def plain() -> Story:
    return Story().launch().start("a").steps("a", 1, 2, 3).steps("a", 4, saved=0.25).end("a")


def test_a_run_without_faults() -> None:
    found = plain().account()
    assert seconds(found) == {"productive": 4.0, "saving": 0.75, "starting": 13.0, "stopping": 1.5}
    assert found.goodput == pytest.approx(4 / 19.25)
    assert (found.steps, found.lost_steps, found.interruptions, found.recoveries) == (4, 0, {}, ())
    assert not found.open


def test_a_first_step_counts_as_much_as_the_later_ones() -> None:
    """Compilation and warm-up, and the wait for the first batch, are part of the start."""
    story = Story().launch().start("a").steps("a", 1, took=9.0, data_wait_seconds=2.0).steps("a", 2, 3, 4).end("a")
    assert seconds(story.account())["starting"] == 13.0 + 8.0
    alone = Story().launch().start("a").steps("a", 1, took=9.0, data_wait_seconds=2.0).end("a").account()
    assert seconds(alone)["productive"] == 7.0  # nothing to compare it with


def killed() -> Story:
    """Killed 0.75 s into step 5, the checkpoint is of step 2: steps 3 and 4 are done again."""
    story = Story().launch().start("a").steps("a", 1, 2, 3, 4).wait(0.25)
    story.restart(2)
    story.start("b", after=5.0).rewind("b", 2).steps("b", 3, 4, 5, 6)
    return story.end("b")


def test_a_killed_run_loses_what_it_does_again_and_the_time_until_it_starts_again() -> None:
    found = killed().account()
    assert seconds(found) == {
        "productive": 6.0, "lost": 2.0 + 0.25 + 1.75, "saving": 0.5, "starting": 13.0 + 6.0, "stopping": 1.5,
    }  # fmt: skip
    assert (found.steps, found.lost_steps, found.generations) == (6, 2, 2)
    assert found.interruptions == {"worker": 1}
    assert found.recoveries == (1750 + 6000,)  # from its last sign to the start of the next step that counts
    [timeline] = found.timelines
    assert [(fault.at, fault.cause) for fault in timeline.faults] == [(17250, "worker")]


def test_a_restart_is_accounted_for_before_the_ranks_are_back() -> None:
    story = Story().launch().start("a").steps("a", 1, 2, 3, 4).wait(0.25)
    story.restart(2)
    found = story.account()
    assert seconds(found) == {"productive": 2.0, "lost": 4.0, "starting": 13.0}
    assert (found.steps, found.lost_steps, found.open) == (2, 2, True)


def test_a_failure_while_recovering_belongs_to_the_same_recovery() -> None:
    story = Story().launch().start("a").steps("a", 1, 2)
    story.restart(2, seconds=(0.0, 0.0, 1.0))
    story.wait(3.0).event("b", "start")  # hangs in its start for 20 s, which is when its last sign was
    story.restart(2, cause="hang", seconds=(20.0, 0.5, 1.0))
    found = story.start("c").steps("c", 3).end("c").account()
    assert found.interruptions == {"worker": 1, "hang": 1}
    assert found.recoveries == (1000 + 23000 + 1500 + 11000,)
    assert seconds(found)["lost"] == 1.0 + 20.0 + 1.5
    assert seconds(found)["starting"] == 13.0 + 3.0 + 11.0


def test_going_back_and_skipping() -> None:
    story = Story().launch().start("a").steps("a", 1, 2, 3).steps("a", 4, 5, skipped=True)
    story.wait(0.5).rewind("a", 2).steps("a", 3, 4).steps("a", 5, skipped=True).steps("a", 6).end("a")
    story.lines[-4][1]["step_seconds"] = 1.5  # the loading is within the time of the next step
    found = story.account()
    assert (found.steps, found.lost_steps, found.skipped_steps) == (6, 3, 1)
    assert seconds(found)["productive"] == 5.0
    assert seconds(found)["lost"] == 3.0 + 0.5 + 1.0
    assert found.recoveries == ()


def test_nobody_pays_for_the_hours_between_two_launches() -> None:
    story = Story().launch().start("a").steps("a", 1, 2).end("a", status=75).wait(5 * HOUR)
    story.launch().start("b").steps("b", 3, 4).end("b")
    found = story.account()
    assert found.wall_ms == 2 * (13000 + 2000 + 2000)
    assert (found.idle_seconds, len(found.timelines), found.interruptions) == (5 * HOUR, 2, {})
    assert found.goodput == pytest.approx(4 / 34)


def test_a_run_in_progress_counts_to_its_last_step() -> None:
    story = Story().launch().start("a").steps("a", 1, 2, 3)
    story.wait(0.75).event("a", "save", step=2)
    found = story.account()
    assert found.open
    assert seconds(found) == {"starting": 13.0, "productive": 3.0}


def test_a_launcher_that_was_killed_left_no_word() -> None:
    """Its last records are all that is known; the step that they belong to is lost as soon as the run goes on."""
    story = Story().launch().start("a").steps("a", 1, 2, 3).wait(0.5).event("a", "save", step=2).wait(9.0)
    story.launch().start("b").rewind("b", 2).steps("b", 3, 4).end("b")
    found = story.account()
    assert seconds(found)["lost"] == 1.0 + 0.5
    assert (found.interruptions, found.lost_steps) == ({"launcher": 1}, 1)
    assert found.recoveries == ()  # nobody was there to start it again
    assert found.idle_seconds == 9.0


def test_a_run_that_failed_for_good_lost_what_no_checkpoint_holds() -> None:
    story = Story().launch().start("a").steps("a", 1, 2, 3).wait(0.5)
    story.event("driver-1", "failure", cause="numeric", step=2)
    found = story.wait(0.5).event("driver-1", "end", exit_status=1).account()
    assert seconds(found) == {"starting": 13.0, "productive": 2.0, "lost": 2.0}
    assert found.interruptions == {"numeric": 1}


def test_nodes_that_come_back_interrupt_but_are_no_failure() -> None:
    story = Story().launch().start("a").steps("a", 1, 2).wait(0.5).event("a", "stop", step=2, seconds_saving=0.25)
    story.restart(2, cause="more workers", seconds=(0.0, 0.0, 0.5))
    found = story.start("b").steps("b", 3).end("b").account()
    assert (found.interruptions, found.recoveries) == ({"more workers": 1}, ())
    assert seconds(found)["lost"] == 0.5 and seconds(found)["saving"] == 0.75
    assert seconds(found)["stopping"] == 0.25 + 1.5


def test_a_start_that_fails_is_a_start() -> None:
    story = Story().launch().wait(3.0).event("driver-1", "failure", cause="user_error", step=0)
    assert seconds(story.event("driver-1", "end", exit_status=1).account()) == {"starting": 5.0}


def test_a_launch_that_has_only_begun() -> None:
    found = Story().launch(before=2.0).account()
    assert seconds(found) == {"starting": 2.0}
    assert (found.open, found.goodput) == (True, 0.0)


def test_an_evaluation_of_the_launcher_is_part_of_it() -> None:
    story = plain().wait(7.0).event("driver-1", "evaluation").wait(60.0).event("somebody-else", "evaluation")
    found = story.account()
    assert seconds(found)["evaluation"] == 7.0 and found.wall_ms == 19250 + 7000


@pytest.mark.parametrize("jump", [-HOUR, -0.4, 0.4, HOUR])
def test_a_wall_clock_that_jumps_changes_nothing_inside_a_process(jump: float) -> None:
    """Set before rank 0's second record, in the first or the second generation, or while the launcher waits."""
    still = killed()
    for first in range(2, len(still.events)):
        story = killed()
        for event in story.events[first:]:
            moved = datetime.fromisoformat(event["time"]).timestamp() + jump
            event["time"] = datetime.fromtimestamp(moved, UTC).isoformat(timespec="milliseconds")
        found = story.account()
        assert found.wall_ms == still.account().wall_ms
        before_a_rank = story.events[first]["kind"] == "start"
        if not before_a_rank:
            assert found.milliseconds == still.account().milliseconds, story.events[first]["kind"]
        else:  # how late the rank came up cannot be known, but its steps are as long as they were
            steps_moved = abs(found.milliseconds["productive"] - still.account().milliseconds["productive"])
            assert steps_moved == 0 and found.lost_steps == 2


def test_rank_and_launcher_may_be_one_process() -> None:
    """As in debug mode, where the same process may even launch twice."""
    story = Story().launch().start("driver-1").steps("driver-1", 1, 2).end("driver-1")
    found = story.account()
    assert seconds(found) == {"productive": 2.0, "saving": 0.5, "starting": 13.0, "stopping": 1.5}
    story._number = 0
    story.launch().start("driver-1").steps("driver-1", 3, 4, 5).end("driver-1")
    assert story.account().steps == 5
    assert seconds(story.account())["productive"] == 5.0


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_are_accounted_for_exactly(seed: int) -> None:
    """Productive is what was kept; lost, whatever else the steps took; nothing is missing, nothing counts twice."""
    rng = random.Random(seed)
    story, step, checkpoint, redone = Story(), 0, 0, 0
    for number in range(rng.randint(1, 3)):
        story.launch(before=rng.random())
        for generation in range(rng.randint(1, 4)):
            rank = f"rank-{number}-{generation}"
            story.start(rank, after=5 * rng.random(), until_first=rng.random())
            if step > checkpoint:
                story.rewind(rank, checkpoint)
                redone += step - checkpoint
                step = checkpoint
            for _ in range(rng.randint(0, 6)):
                saved = rng.choice([0.0, 0.125])
                checkpoint = step if saved else checkpoint
                step += 1
                story.steps(rank, step, took=0.5, saved=saved)
            story.wall_error = rng.choice([0.0, -50.0, 50.0])
            story.wait(rng.random())
            if generation < 3 and rng.random() < 0.7:
                story.restart(checkpoint, seconds=(0.125, 0.125, rng.random()))
            else:
                break
        if rng.random() < 0.5:
            story.event(story.driver, "end", exit_status=1)
        story.wait(10 * rng.random())
    found = story.account()
    pending = found.lost_steps - redone
    assert pending in (0, step - checkpoint)
    kept = len(story.lines) - found.lost_steps
    assert abs(found.milliseconds["productive"] - 500 * kept) <= 2 * len(story.lines)


def test_running_figures_are_those_of_the_account() -> None:
    story = Story().launch().start("a")
    running = Running(story.account(), now=story.events[-1]["seconds"], kind="starting")
    tags: dict[str, float] = {}
    story.steps("a", 1, 2).steps("a", 3, saved=0.5).steps("a", 4, skipped=True)
    for _, line in story.lines:
        tags = running.add(line, line["seconds"])
    found = story.account()
    for kind in KINDS[:-1]:
        assert tags[f"time/{kind}_seconds"] == pytest.approx(found.milliseconds[kind] / 1e3), kind
    assert tags["time/goodput"] == pytest.approx(found.goodput)


def test_the_time_until_the_running_account_was_opened_is_not_forgotten() -> None:
    story = Story().launch().start("a").steps("a", 1, 2)
    running = Running(story.account(), now=story.lines[-1][1]["seconds"] + 3.0, kind="lost")
    assert running.add({}, story.lines[-1][1]["seconds"] + 4.0)["time/lost_seconds"] == 3.0


def test_in_words() -> None:
    assert in_words(killed().account()) == (
        "31.0 s in all, 19.4% productive (goodput), lost 4.00 s (2 steps), saving 0.50 s, starting 19.0 s, "
        "stopping 1.50 s; interrupted by worker 1x; recovered after 7.75 s on average"
    )


def test_a_folder_tells_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create("")
    story = killed()
    for event in story.events:
        run.events.append(event)
    for _, line in story.lines:
        run.metrics.append({**line, "loss": 3.0, "tokens": 1})
    # the made-up offsets do not fit this file
    assert any(event["kind"] == "rewind" for event in story.events)
    found = read_account(run.path)
    assert found is not None and found.generations == 2
    figures = summarize(run.path)["accounting"]
    assert figures == found.figures()
    text = write_report(run.path).read_text()
    assert "## Where the run's time went" in text and "| starting | 19.0 s |" in text
    if "plots/timeline.png" in text:
        assert (run.path / "plots" / "timeline.png").stat().st_size > 1000


def test_a_run_from_before_launches_were_recorded_has_no_account(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create("")
    run.event("start", cause="x")
    assert read_account(run) is None
    assert "accounting" not in summarize(tmp_path)
    assert "time went" not in write_report(tmp_path).read_text()


def test_evaluations_in_the_course_of_training_are_their_own_kind() -> None:
    story = Story().launch().start("rank-a").steps("rank-a", 1, 2, saved=0.5)
    for number in (3, 4):  # the evaluation is behind the step, and no part of its step_seconds
        story.wait(3.0)
        story.steps("rank-a", number, evaluation_seconds=3.0)
        story.lines[-1][1]["step_seconds"] -= 3.0
    found = account(launches_of(story.end("rank-a").events, story.lines))
    assert found is not None and found.milliseconds["evaluation"] == 6000
    assert found.milliseconds["productive"] == 4000 and found.milliseconds["saving"] == 1000
    assert sum(found.milliseconds.values()) == found.wall_ms
    running = Running(found, 0.0, "productive")
    tags = running.add({"evaluation_seconds": 2.0, "save_seconds": 0.5}, 3.5)
    assert tags["time/evaluation_seconds"] == 8.0 and tags["time/saving_seconds"] == 1.5
