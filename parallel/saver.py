"""Saves while training goes on: the state is copied, written by a thread, and published once all ranks have written.

Only the copying holds training up. A save goes through two stages, each a piece of work in the background:

    writing      every rank writes its file
    publishing   rank 0 writes manifest and COMMIT, renames, and deletes older checkpoints

From one to the next all ranks go together, at a step boundary: `done_here` of every rank is summed with whatever else
ranks agree on at the start of a step, and when all are done each calls `advance`. Only one save is under way at a time.
"""

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel import retention, saving
from parallel.checkpoint import CheckpointError
from parallel.communicator import Communicator
from parallel.engine import Engine
from parallel.roots import Root
from parallel.saving import Hook, HostBuffer, no_hook


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    path: the published folder, None where it failed. error: why it failed, else empty.
    removed: names of older checkpoints that were deleted; not_removed: why that failed, else empty.
    blocked_seconds: how long this rank's training stood still for it; seconds: from its start to its end.
    """

    step: int
    path: Root | None
    error: str
    removed: tuple[str, ...]
    not_removed: str
    blocked_seconds: float
    seconds: float


class _Work:
    """One call in a thread of its own. A daemon: a disk that hangs must not keep the process from ending."""

    def __init__(self, call: Callable[[], dict[str, Any]], name: str) -> None:
        self._result: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Whether it is done, after waiting for it at most so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """What the call returned, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


@dataclass
class _Save:
    """The save under way. `work` is None where this rank has nothing to do in the present stage."""

    step: int
    draft: Root
    extra: Mapping[str, Any]
    hook: Hook
    started: float
    publishing: bool = False
    work: _Work | None = None


class Saver:
    """Writes checkpoints of one engine in the background; every method but `done_here` and `close` is collective.

    Args:
        root: the folder or address of checkpoints, on storage that every rank sees.
        engine, biases: whose state is saved, see `saving.save`.
        communicator: all ranks.
        keep, keep_every_steps: see `retention.kept_steps`.
        timeout_s: the longest wait for a save.
        owns: whether a checkpoint of the run with this id may be replaced or deleted.
    """

    def __init__(
        self,
        root: Root,
        engine: Engine,
        biases: Mapping[str, Tensor],
        communicator: Communicator,
        *,
        keep: int,
        keep_every_steps: int = 0,
        timeout_s: float = 1800.0,
        owns: Callable[[str], bool] = retention.everybody,
    ) -> None:
        self.root, self.engine, self.biases, self.communicator = root, engine, biases, communicator
        self.owns = owns
        self.keep, self.keep_every_steps, self.timeout_s = keep, keep_every_steps, timeout_s
        self._buffer = HostBuffer()
        self._save: _Save | None = None
        self._blocked = 0.0

    @property
    def under_way(self) -> bool:
        """Whether a save was started and has not ended; the same on every rank."""
        return self._save is not None

    def done_here(self) -> bool:
        """Whether this rank has done its part of the present stage."""
        return self._save is not None and (self._save.work is None or self._save.work.wait(0))

    def start(self, step: int, extra: Mapping[str, Any], hook: Hook = no_hook) -> Outcome | None:
        """Copies the state as it is now and begins to write it.

        Args:
            step: optimizer steps done.
            extra: JSON-able, see `saving.save`.
            hook: told of the points that `saving` lists, in whatever thread comes to them.

        Returns:
            None, or the outcome where it failed at once: no space, no folder.

        Raises:
            RuntimeError: another save is under way.
        """
        if self._save is not None:
            raise RuntimeError(f"the save of step {self._save.step} is still under way; finish it before another")
        started, self._blocked = time.perf_counter(), 0.0
        rank = self.communicator.rank
        share = saving.snapshot(self.engine, self.biases, rank, self._buffer)
        try:
            draft = saving.open_draft(self.root, step, share.n_bytes, self.communicator)
        except CheckpointError as error:
            self._blocked = seconds = time.perf_counter() - started
            return Outcome(step, None, str(error), (), "", self._blocked, seconds)
        work = _Work(lambda: saving.write_share(draft, rank, share, hook), f"trimtab-save-{rank}")
        self._save = _Save(step, draft, copy.deepcopy(dict(extra)) if rank == 0 else {}, hook, started, work=work)
        self._blocked = time.perf_counter() - started
        return None

    def advance(self) -> Outcome | None:
        """Goes to the next stage; call it when every rank is done with the present one.

        Returns:
            The outcome when the save has ended, else None.
        """
        save = self._save
        assert save is not None, "no save is under way"
        entered = time.perf_counter()
        told = self.communicator.gather(save.work.result() if save.work is not None else {})
        errors = [report["error"] for report in told if report.get("error")]
        if not errors and not save.publishing:
            save.publishing = True
            save.work = self._publish(save, told) if self.communicator.rank == 0 else None
            self._blocked += time.perf_counter() - entered
            return None
        error, path = "", None if errors else saving.final_folder(save.draft, self.root, save.step)
        try:
            saving.raise_together(errors, save.draft, self.communicator.rank)
        except CheckpointError as failed:
            error = str(failed)
        self._save = None
        now = time.perf_counter()
        self._blocked += now - entered
        removed = tuple(told[0].get("removed", ()))
        not_removed = told[0].get("not_removed", "")
        return Outcome(save.step, path, error, removed, not_removed, self._blocked, now - save.started)

    def finish(self) -> Outcome:
        """Waits for the save that is under way.

        Raises:
            CheckpointError: on every rank, when it is not done after `timeout_s`; names the ranks that are not.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            while not self._all_done(deadline):
                pass
            outcome = self.advance()
            if outcome is not None:
                return outcome

    def close(self, wait_s: float = 10.0) -> None:
        """Gives up the save that is under way, if any: its draft is not published. Waits a little for its thread."""
        if self._save is not None and self._save.work is not None:
            self._save.work.wait(wait_s)
        self._save = None

    def _all_done(self, deadline: float) -> bool:
        """Asks all ranks, after a moment in which this one may become done."""
        assert self._save is not None, "no save is under way"
        entered = time.perf_counter()
        done = self._save.work is None or self._save.work.wait(0.02)
        flags = torch.tensor([int(done), int(time.monotonic() > deadline)], dtype=torch.int64)
        n_done, n_late = self.communicator.all_reduce(flags).tolist()
        self._blocked += time.perf_counter() - entered
        if n_done == self.communicator.size:
            return True
        if n_late:
            ranks = [rank for rank, one in enumerate(self.communicator.gather(done)) if not one]
            stage = "publishing" if self._save.publishing else "writing"
            raise CheckpointError(
                f"after {self.timeout_s:.0f} s ranks {ranks} are still {stage} the checkpoint of step "
                f"{self._save.step} in {self._save.draft}; check that the storage answers, or raise "
                "checkpoint.timeout_s"
            )
        return False

    def _publish(self, save: _Save, reports: list[dict[str, Any]]) -> _Work:
        """Rank 0's part of the second stage."""
        final = saving.final_folder(save.draft, self.root, save.step)

        def work() -> dict[str, Any]:
            try:
                saving.publish(save.draft, final, saving.manifest(save.step, reports, save.extra), save.hook, self.owns)
            except OSError as error:
                return {"error": f"rank 0 could not publish {final}: {error}"}
            try:
                removed = retention.prune(self.root, self.keep, save.step, self.keep_every_steps, save.hook, self.owns)
            except OSError as error:  # the new checkpoint stands; the next save tries again
                return {"error": "", "not_removed": str(error)}
            return {"error": "", "removed": [path.name for path in removed]}

        return _Work(work, "trimtab-publish")
