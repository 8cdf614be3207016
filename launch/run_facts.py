"""The report's table of what ran: size, hardware, versions, commit and dates, from the run's events `start`."""

from collections.abc import Mapping, Sequence
from typing import Any


def facts_table(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of the newest start's facts, with the earlier ones named where they differ; empty without any.

    Args:
        events: of the run, in order.
    """
    starts = [event for event in events if event["kind"] == "start" and "hardware" in event]
    if not starts:
        return []
    newest = starts[-1]
    rows = [
        ("parameters", f"{newest['parameters']:,}, {newest['active_parameters']:,} of them active for a token"),
        ("ranks", _ranks(newest)),
        *((name, _all(starts, name)) for name in ("hardware", "versions", "commit")),
        ("first start", f"{starts[0]['date'].replace('T', ' ').replace('+00:00', '')} UTC"),
    ]
    if len(starts) > 1:
        rows.append(("starts", f"{len(starts)}, the last on {newest['date'].replace('T', ' ')[:19]} UTC"))
    return ["| what ran | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]


def _ranks(start: Mapping[str, Any]) -> str:
    stage = start.get("zero_stage")
    sharding = "torch's AdamW" if stage is None else f"ZeRO stage {stage}"
    return (
        f"{start['world_size']} in expert-parallel groups of {start['ep_size']}, {sharding}, on {start['device']} "
        f"(launcher {start['launcher']}, {start['threads_per_rank']} threads a rank)"
    )


def _all(starts: Sequence[Mapping[str, Any]], name: str) -> str:
    """The newest start's value, and those of earlier starts where they differ."""
    told = list(dict.fromkeys(_said(start.get(name)) for start in reversed(starts)))
    return told[0] + (f" (before: {'; '.join(told[1:])})" if len(told) > 1 else "")


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
    return "not a git repository" if value is None else str(value)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
