"""The checkpoints of a run as training sees them: started, published when ready, told of, counted when they fail."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from launch.alarms import WHOLE_RUN, Alarm
from launch.config import CheckpointConfig
from launch.telemetry import Telemetry
from parallel.checkpoint import CheckpointError
from parallel.roots import Root
from parallel.saver import Outcome, Saver
from parallel.saving import Hook, no_hook


class Saves:
    """Runs a `Saver` by the configuration. All but `done_here`, `holding`, `take_held` and `close` is collective.

    A save that fails is an alarm and training goes on; `checkpoint.max_failed_saves` in a row stop the run, and so does
    the failure of a save that the run cannot do without, its last.

    Args:
        config: asynchronous and max_failed_saves. saver: who saves. telemetry: for the events.
    """

    def __init__(self, config: CheckpointConfig, saver: Saver, telemetry: Telemetry) -> None:
        self.config, self.saver, self.telemetry = config, saver, telemetry
        self.failed_in_a_row = 0
        self.blocked_seconds = 0.0  # training stood still for so long, on this rank, all saves together
        self._held = 0.0
        self._cause = ""
        self._since = 0  # step of the first of the saves in a row that failed

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Counts what runs inside as time that training stood still for a save, whatever the time went into."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._held += time.perf_counter() - began

    def take_held(self) -> float:
        """The seconds counted by `holding` since the last call."""
        taken, self._held = self._held, 0.0
        return taken

    def start(
        self, step: int, cause: str, extra: Mapping[str, Any], *, wait: bool = False, needed: bool = False,
        hook: Hook = no_hook,
    ) -> Root | None:  # fmt: skip
        """Saves the state as it is now; the one that is still under way is waited for first.

        Args:
            step: optimizer steps done. cause: why, for people. extra: for the manifest, see `saving.save`.
            wait: return when it is published; else it is written while training goes on, if the configuration allows.
            needed: failing is an error.
            hook: see `Saver.start`.

        Returns:
            The published folder; None where it is still being written, or failed.

        Raises:
            CheckpointError: on every rank, see above.
        """
        self.settle()
        self._cause = cause
        outcome = self.saver.start(step, extra, hook)
        if outcome is None and (wait or needed or not self.config.asynchronous):
            outcome = self.saver.finish()
        return self._told(outcome, needed) if outcome is not None else None

    def done_here(self) -> bool:
        """Whether this rank has done its part of the save under way; summed over the ranks, it is for `poll`."""
        return self.saver.done_here()

    def poll(self, n_done: int) -> None:
        """Takes the save under way a stage further if every rank is done; called once at the start of each step.

        Args:
            n_done: ranks that said `done_here`, the same number on every rank.
        """
        if self.saver.under_way and n_done == self.saver.communicator.size:
            outcome = self.saver.advance()
            if outcome is not None:
                self._told(outcome, needed=False)

    def settle(self) -> None:
        """Waits for the save under way, if there is one; raises what `start` does."""
        if self.saver.under_way:
            self._told(self.saver.finish(), needed=False)

    def close(self) -> None:
        """Gives up the save that is under way."""
        self.saver.close()

    def _told(self, outcome: Outcome, needed: bool) -> Root | None:
        self.blocked_seconds += outcome.blocked_seconds
        if outcome.path is not None:
            if self.failed_in_a_row:
                self._alarm(outcome.step, f"ended: saved again, after {self.failed_in_a_row} failed saves", ended=True)
            self.failed_in_a_row = 0
            self.telemetry.event(
                "save", cause=self._cause, step=outcome.step, path=str(outcome.path),
                seconds_blocked=round(outcome.blocked_seconds, 3), seconds_taken=round(outcome.seconds, 3),
            )  # fmt: skip
            if outcome.not_removed:
                self.telemetry.event(
                    "fault", cause=f"older checkpoints were not deleted: {outcome.not_removed}", step=outcome.step
                )
            return outcome.path
        self.failed_in_a_row += 1
        limit = self.config.max_failed_saves
        if self.failed_in_a_row == 1:
            self._since = outcome.step
        self._alarm(
            outcome.step,
            f"the checkpoint was not saved: {outcome.error}; {self.failed_in_a_row} in a row, {limit} stop the run",
        )
        if needed:
            raise CheckpointError(f"the run's last checkpoint, of step {outcome.step}, was not saved: {outcome.error}")
        if self.failed_in_a_row >= limit:
            raise CheckpointError(
                f"{self.failed_in_a_row} saves in a row have failed, the last at step {outcome.step}: {outcome.error}; "
                "make room or repair the storage, then run the same command again; checkpoint.max_failed_saves sets "
                "how many are put up with"
            )
        return None

    def _alarm(self, step: int, cause: str, *, ended: bool = False) -> None:
        self.telemetry.alarms(
            [Alarm("save_failed", step, self._since, WHOLE_RUN, None, None, self.failed_in_a_row,
                   self.config.max_failed_saves, "log", ended, cause)]
        )  # fmt: skip
