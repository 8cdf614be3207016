"""Every run under a folder, a line each: how far it is, how it ended, its loss, and what may still be going on."""

import tomllib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.runfolder import DamagedRecordError, RunFolder, read_records

NOT_LOOKED_INTO = ("checkpoints", "tensorboard", "logs", "plots")  # folders of a run, which hold no further runs


@dataclass(frozen=True)
class RunLine:
    """What `trimtab runs` shows of one run.

    steps: done, and committed to its history. of: train.steps. state: "done", "stopped", "failed", "open" (no end was
    written: it is under way or was killed), "not started" or "damaged". loss: of the last step. heldout_bits_per_byte:
    of the last evaluation. last: when its last event was written, UTC.
    """

    run: str
    state: str
    steps: int
    of: int | None
    loss: float | None
    heldout_bits_per_byte: float | None
    max_vio: float | None
    objective: str
    last: str | None
    cause: str


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders of runs at or under a folder, by name; runs inside runs are found too, links are not followed."""
    if (folder / "config.toml").is_file() and (folder / "checkpoints").is_dir():
        yield folder
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    for entry in inside:
        if entry.name not in NOT_LOOKED_INTO and not entry.name.startswith("."):
            yield from find_runs(entry)


def run_line(path: Path, shown_as: str) -> RunLine:
    """One run's line, from its files; a file that cannot be read makes the state "damaged", with why as the cause."""
    run = RunFolder(path)
    try:
        config = tomllib.loads(run.config.read_text(encoding="utf-8"))
        events = read_records(run.events_path)
        newest = deque(run.committed("metrics"), maxlen=1)
        last: Mapping[str, Any] = newest[0] if newest else {}
    except (DamagedRecordError, OSError, ValueError) as error:
        return RunLine(shown_as, "damaged", 0, None, None, None, None, "", None, str(error))
    state, cause = _state(events)
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    return RunLine(
        shown_as,
        state,
        last.get("step", 0),
        config.get("train", {}).get("steps"),
        last.get("loss"),
        evaluations[-1].get("bits_per_byte") if evaluations else None,
        last.get("max_vio"),
        config.get("objective", {}).get("kind", "pretrain"),
        events[-1]["time"][:19].replace("T", " ") if events else None,
        cause,
    )


def list_runs(folder: Path) -> list[RunLine]:
    """Lines of all runs under a folder, in order of their paths, named relative to it."""
    found = find_runs(folder)
    return [run_line(path, path.name if path == folder else str(path.relative_to(folder))) for path in found]


def table(lines: Sequence[RunLine]) -> str:
    """The lines as text in columns."""
    rows = [["run", "state", "step", "loss", "held-out", "max_vio", "last event (UTC)", "why it ended"]]
    rows += [
        [
            line.run, line.state, f"{line.steps}/{line.of}" if line.of else str(line.steps), _show(line.loss, 3),
            _show(line.heldout_bits_per_byte, 3), _show(line.max_vio, 2), line.last or "-",
            "" if line.state == "done" else line.cause[:60],
        ]
        for line in lines
    ]  # fmt: skip
    right = {2, 3, 4, 5}
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip


def as_data(lines: Sequence[RunLine]) -> list[dict[str, Any]]:
    """The lines for ``--json``."""
    return [asdict(line) for line in lines]


def _state(events: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """State and cause by the last launch's end, or the lack of one."""
    launches = [number for number, event in enumerate(events) if event["kind"] == "launch"]
    if not launches:
        return "not started", ""
    ends = [event for event in events[launches[-1] :] if event["kind"] == "end"]
    if not ends:
        return "open", "no end was written: under way, or killed"
    if ends[-1].get("exit_status") == 0:
        return "done", ends[-1]["cause"]
    stopped = ends[-1].get("exit_status") == 75
    return ("stopped" if stopped else "failed"), str(ends[-1]["cause"]).strip().splitlines()[0]


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
