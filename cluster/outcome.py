"""Judges how a launch ended from what every rank reported: one exit status, one cause, pure functions only."""

from collections.abc import Mapping, Sequence

from cluster.context import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, EXIT_STOPPED, STOPPED, LaunchResult, RankFailure

# A rank that vanished explains the broken connections that its peers report at the same moment, so it comes first.
CAUSE_ORDER = {"start": 0, "capacity": 0, "node": 1, "killed": 1, "hang": 1, "timeout": 2, "exited": 3, "exception": 4}
SAME_MOMENT_S = 1.0


def failure_of(rank: int, report: Mapping) -> RankFailure:
    """The failure in a rank's report, as `entry.run_entry` writes it."""
    return RankFailure(
        rank=rank,
        kind=report["kind"],
        message=report["error"],
        exit_code=report["exit_code"],
        observed_at=report["at"],
        exception=tuple(report.get("exception", ())),
    )


def conclude(
    reports: Sequence[Mapping | None], lost: Sequence[RankFailure] = (), stop_asked: bool = False
) -> LaunchResult:
    """The launch's result.

    Args:
        reports: each rank's report by rank, None where none arrived.
        lost: failures that the launcher itself saw (a killed process, a wait that ran out).
        stop_asked: whether somebody asked for a stop; only then is a stop a success of its kind.
    """
    results = [report["result"] if report and report["ok"] else None for report in reports]
    known = {failure.rank for failure in lost}
    failures = list(lost)
    failures += [failure_of(r, p) for r, p in enumerate(reports) if p and not p["ok"] and r not in known]
    if failures:
        ordered = by_cause(failures)
        return LaunchResult(ordered[0].exit_code, results, describe(ordered), tuple(ordered))
    missing = [rank for rank, report in enumerate(reports) if report is None]
    if missing:
        return LaunchResult(EXIT_FAILED, results, f"no result arrived from rank {missing}")
    if any(result and result.get("status") == STOPPED for result in results):
        why = "stopped on request" if stop_asked else "stopped by its own decision"
        return LaunchResult(EXIT_STOPPED, results, why)
    return LaunchResult(EXIT_OK, results)


def by_cause(failures: Sequence[RankFailure]) -> list[RankFailure]:
    """The likely cause first: the earliest, except that among those of one moment a vanished rank leads."""
    if not failures:
        return []
    first = min(failure.observed_at for failure in failures)

    def key(failure: RankFailure) -> tuple:
        same_moment = failure.observed_at - first <= SAME_MOMENT_S
        order = CAUSE_ORDER.get(failure.kind, len(CAUSE_ORDER))
        return (not same_moment, order if same_moment else 0, failure.observed_at, failure.rank)

    return sorted(failures, key=key)


def describe(ordered: Sequence[RankFailure]) -> str:
    """One text: the cause in full, and the names of the ranks that failed after it."""
    cause = ordered[0]
    head = f"rank {cause.rank} failed ({cause.kind}"
    head += f", signal {cause.signal})" if cause.signal else ")"
    text = f"{head}:\n{cause.message.rstrip()}"
    if len(ordered) > 1:
        others = ", ".join(f"{failure.rank} ({failure.kind})" for failure in ordered[1:])
        text += f"\nalso failed: rank {others}"
    return text


def refused(world_size: int, error: str) -> LaunchResult:
    """The result of a launch that was turned down before anything started."""
    return LaunchResult(EXIT_BAD_INPUT, [None] * world_size, error)
