"""Says why ranks failed, in one of seven words that a program can read: pure functions only."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.context import RankFailure

Cause = Literal["user_error", "worker", "node", "preemption", "storage", "numeric", "hang"]

STARTING = ("start", "load")  # sections before the first step of a generation
SIGTERM = 15

# What torch.distributed says, over Gloo or NCCL, when another rank has gone: the news of a failure, not its cause.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket closed|connection refused|remote process exited|"
    r"timed out waiting|gloo.{0,80}time(d )?out|nccl.{0,80}(error|timeout)|peer .{0,40}(closed|gone)",
    re.IGNORECASE | re.DOTALL,
)
_MISTAKES = ("FileNotFoundError", "PermissionError", "NotADirectoryError", "IsADirectoryError", "FileExistsError")


@dataclass(frozen=True)
class Place:
    """Where a rank was when it was last seen.

    section: start, load, data, forward, backward, step, save... step: the step it was in, 1-based; None before the
    first. seen_at: time.time() seconds, 0 when it was never seen.
    """

    section: str = "start"
    step: int | None = None
    seen_at: float = 0.0

    @property
    def is_starting(self) -> bool:
        """Whether the rank had not yet begun a step of its generation."""
        return self.section in STARTING

    def __str__(self) -> str:
        return f"step {self.step}" if self.step is not None and not self.is_starting else f"section {self.section}"


@dataclass(frozen=True)
class Names:
    """Exceptions, by the names of their classes, whose cause does not depend on where they were raised."""

    storage: Collection[str] = ()
    numeric: Collection[str] = ()


NO_NAMES = Names()


def lost_a_peer(failure: RankFailure) -> bool:
    """Whether a rank only reports that another one went away."""
    if failure.kind != "exception" or "RuntimeError" not in failure.exception:
        return False
    last = failure.message.rstrip().rpartition("\n")[2]
    return bool(_PEER_LOST.search(last))


def first_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """The failure that explains the others.

    Args:
        failures: the likely cause first, as `outcome.by_cause` orders them; not empty. A rank that lost its peer comes
            after everything else, however early it noticed: the news of a lost machine travels more slowly.
    """
    return next((failure for failure in failures if not lost_a_peer(failure)), failures[0])


def cause_of(failure: RankFailure, place: Place, names: Names = NO_NAMES) -> Cause:
    """Which of the seven it was.

    Args:
        failure: from `first_cause`. place: where its rank was. names: the exceptions of the entry.
    """
    if failure.kind in ("node", "capacity"):
        return "node"
    if failure.kind in ("timeout", "hang"):
        return "hang"
    if failure.kind == "killed":
        return "preemption" if failure.signal == SIGTERM else "worker"
    if failure.kind == "start":
        return "worker"
    raised = set(failure.exception)
    if "NoTerminalError" in raised:
        return "user_error"
    if raised & set(names.numeric):
        return "numeric"
    if raised & set(names.storage):
        return "storage"
    if "OSError" in raised and "BrokenPipeError" not in raised and not (place.is_starting and raised & set(_MISTAKES)):
        return "storage"
    if lost_a_peer(failure):
        return "worker"
    return "user_error" if place.is_starting else "worker"
