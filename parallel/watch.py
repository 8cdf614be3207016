"""Who did not arrive: when a wait between ranks fails, the ranks that are left find out together which one it was.

Nothing is posted while all goes well. A rank whose wait fails writes where it is into the store that the process group
was made with, gives the others a moment to do the same, and names those that wrote nothing.
"""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_VERDICT = "trimtab/lost/verdict"
_POLL_S = 0.05


class LostRankError(RuntimeError):
    """A rank did not arrive, or ranks are out of step; the message says which, where, and what was expected of it."""


@dataclass(frozen=True)
class Wait:
    """One wait that failed.

    what: the transfer, for people. members: world ranks of the group. expected: what each member was to send here.
    waited_s: seconds until it failed.
    """

    what: str
    members: list[int]
    expected: dict[int, str]
    waited_s: float


class Watch:
    """Where this rank is in the run, and the way to tell the others when it waits in vain.

    Args:
        store: the process group's store; None where ranks are threads or there is only one: they cannot be lost.
        rank: this rank in the world.
        timeout_s: how long a wait may take.
    """

    def __init__(self, store: Any = None, rank: int = 0, timeout_s: float = 600.0) -> None:
        self.store = store
        self.rank = rank
        self.timeout_s = timeout_s
        self.step = 0  # the train loop's, from 1; 0 before it starts
        self.layer = ""

    @property
    def place(self) -> str:
        """Step and layer as words."""
        return f"step {self.step}" + (f", layer {self.layer}" if self.layer else "")

    @property
    def grace_s(self) -> float:
        """How long the others get to report: they began to wait at other times."""
        return min(10.0, max(1.0, self.timeout_s / 2))

    def lost(self, error: Exception, wait: Wait) -> LostRankError:
        """Finds out who is missing; takes up to `grace_s`.

        Args:
            error: what the backend said.
            wait: the wait that failed.

        Returns:
            The error to raise, the same cause on every rank that is left.
        """
        if self.store is None:
            return LostRankError(f"{self.place}: {wait.what} failed: {error}")
        try:
            self.store.set_timeout(timedelta(seconds=self.grace_s))
            reports = self._reports(wait)
            verdict = self._agree(self._judge(wait, reports))
        except (RuntimeError, dist.DistError) as silent:
            verdict = f"the store of the process group does not answer ({_first_line(silent)}): rank 0 keeps it"
        return LostRankError(
            f"{verdict}; rank {self.rank} was at {self.place}: {wait.what}, and stops ({_first_line(error)})"
        )

    def explain(self, error: BaseException) -> None:
        """Adds to any error what other ranks have found out, if they have: for waits that are not ours to watch."""
        speaks_of_ranks = any(word in str(error) for word in ("Timed out", "Connection", "gloo", "NCCL"))
        if self.store is None or isinstance(error, LostRankError) or not speaks_of_ranks:
            return
        try:
            self.store.set_timeout(timedelta(seconds=self.grace_s))
            deadline = time.monotonic() + self.grace_s + 1.0  # theirs may only just have begun
            while time.monotonic() < deadline and not self.store.check([_VERDICT]):
                time.sleep(_POLL_S)
            if self.store.check([_VERDICT]):
                error.add_note(self.store.get(_VERDICT).decode())
        except (RuntimeError, dist.DistError):
            return  # the store died with its rank: the error says enough

    def _reports(self, wait: Wait) -> dict[int, dict[str, Any]]:
        """Posts this rank's place and collects the others' until all are there or the grace is over."""
        mine = {"place": self.place, "what": wait.what, "waited_s": round(wait.waited_s, 3)}
        self.store.set(_key(self.rank), json.dumps(mine))
        reports = {self.rank: mine}
        deadline = time.monotonic() + self.grace_s
        while time.monotonic() < deadline and len(reports) < len(wait.members):
            for member in wait.members:
                if member not in reports and self.store.check([_key(member)]):
                    reports[member] = json.loads(self.store.get(_key(member)))
            time.sleep(_POLL_S)
        return reports

    def _judge(self, wait: Wait, reports: dict[int, dict[str, Any]]) -> str:
        missing = [member for member in wait.members if member not in reports]
        if not missing:  # it came after the others had given up
            longest = max(report["waited_s"] for report in reports.values())
            missing = [member for member, report in reports.items() if report["waited_s"] < longest / 2]
        if not missing:
            places = "; ".join(
                f"rank {rank} at {report['place']}: {report['what']}" for rank, report in sorted(reports.items())
            )
            return f"ranks wait for each other: {places}"
        return "; ".join(
            f"rank {member} did not arrive within {self.timeout_s:g} s at {self.place}, {wait.what}: "
            f"{wait.expected.get(member, 'its part')} was expected from it"
            for member in missing
        )

    def _agree(self, verdict: str) -> str:
        """The first verdict in the store is everybody's: later ones may rest on the consequences of the first."""
        first = self.store.compare_set(_VERDICT, "", verdict)
        return first.decode() if isinstance(first, bytes) else str(first)


def _key(rank: int) -> str:
    return f"trimtab/lost/{rank}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:160]
