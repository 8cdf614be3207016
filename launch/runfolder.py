"""A run's folder on disk: its paths, its append-only JSON-lines files, and which of their records count.

Nothing is ever deleted from the record files. When training goes on from an earlier step (a resume after a crash, a
roll-back), a ``rewind`` event notes the step and how long each file was: records of later steps that lie before that
length are history that did not become part of the run. ``committed`` reads what remains.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cluster.redact import redact, redacted

REWIND = "rewind"


class DamagedRecordError(ValueError):
    """A line in the middle of a record file is not a JSON object."""


def _plain(value: Any) -> Any:
    """What json cannot write by itself: numpy and torch scalars and arrays, paths, sets of strings."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a record holds a {type(value).__name__}; give numbers, strings, lists and mappings")


def _without_non_finite(value: Any, found: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found.append("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
        return None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item, found) for item in value]
    if hasattr(value, "tolist"):
        return _without_non_finite(value.tolist(), found)
    return value


def finite_json(record: Mapping[str, Any]) -> str:
    """The record as one line of standard JSON; NaN and infinities become null, and ``non_finite`` says which."""
    try:
        return json.dumps(record, allow_nan=False, default=_plain, separators=(",", ":"))
    except ValueError:
        clean: dict[str, Any] = {}
        noted: dict[str, str] = {}
        for key, value in record.items():
            found: list[str] = []
            clean[key] = _without_non_finite(value, found)
            if found:
                noted[key] = found[0]
        return json.dumps({**clean, "non_finite": noted}, allow_nan=False, default=_plain, separators=(",", ":"))


class JsonLines:
    """An append-only file of one JSON object a line; each record is one write, so a killed process leaves no half line.

    A line torn by a full disk or a power cut is cut off when the file is next opened for writing. Several processes may
    append to one file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes the record through to the operating system. Raises: OSError (the file keeps only whole lines)."""
        line = (finite_json(record) + "\n").encode()
        with self._lock:
            fd = self._open()
            written = os.write(fd, line)
            while written < len(line):  # a disk that is nearly full takes a part; the next write raises its error
                try:
                    written += os.write(fd, line[written:])
                except OSError:
                    os.ftruncate(fd, os.fstat(fd).st_size - written)
                    raise

    def size(self) -> int:
        """Bytes of whole lines in the file, after cutting off a torn last one; 0 when there is no file."""
        if not self.path.exists():
            return 0
        with self._lock:
            return os.fstat(self._open()).st_size

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _cut_torn_line(self._fd)
        return self._fd


def _cut_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return
    time.sleep(0.05)  # what looks torn may be another process' write in flight
    if os.fstat(fd).st_size != size:
        return
    start = size
    while start > 0:
        block_start = max(0, start - 65536)
        newline = os.pread(fd, start - block_start, block_start).rfind(b"\n")
        if newline >= 0:
            start = block_start + newline + 1
            break
        start = block_start
    tail = os.pread(fd, size - start, start)
    if _object(tail) is not None:
        os.write(fd, b"\n")  # only the line's end was lost
    else:
        os.ftruncate(fd, start)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, record) of each line; a truncated last line is left out, a missing file is empty.

    Raises: DamagedRecordError for a line before the last that is not a JSON object.
    """
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = _object(line)
                if record is not None:
                    yield offset, record
                elif line.endswith(b"\n"):
                    raise DamagedRecordError(
                        f"{path}, line {number}, is not a JSON object: {line[:60]!r}; restore the file from a copy, "
                        "or delete this line if its step can be missed"
                    )
            offset += len(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON-lines file in the order of writing; see ``read_lines``."""
    return [record for _, record in read_lines(path)]


class RunFolder:
    """The names of everything in a run's folder, and the writers of its record files.

    Making the object touches nothing on disk; ``create`` does. Attributes ``config, metrics_path, events_path,
    ledger_path, faults_path, tensorboard, checkpoints, logs, report, coactivation`` are paths, ``metrics, events,
    ledger, orders`` the append-only files; ``orders`` has a line for each order of the data, see `data.orders`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.events_path = self.path / "events.jsonl"
        self.ledger_path = self.path / "ledger.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.report = self.path / "report.md"
        self.coactivation = self.path / "coactivation.json"
        self.faults_path = self.path / "faults.jsonl"
        self.metrics = JsonLines(self.metrics_path)
        self.events = JsonLines(self.events_path)
        self.ledger = JsonLines(self.ledger_path)
        self.orders = JsonLines(self.path / "orders.jsonl")

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def is_run(self) -> bool:
        return self.config.is_file()

    def create(self, config_toml: str) -> None:
        """Makes the folder with its sub-folders and writes (or replaces) config.toml, which is what makes it a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        unfinished = self.path / f".config.toml.{os.getpid()}"
        unfinished.write_text(redact(config_toml), encoding="utf-8")
        unfinished.replace(self.config)
        for folder in (self.tensorboard, self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)

    def event(self, kind: str, *, cause: str, **fields: Any) -> dict[str, Any]:
        """Appends one event and returns it.

        Args:
            kind: launch, start, restart, resume, change, save, skip, rewind, fault, alarm, evaluation, stop, end...
            cause: why it happened, for a reader who was not there.
            fields: whatever else belongs to it (``step``, ``rank``, ``path``...); not ``time``, ``seconds`` or
                ``process``, which are set here: UTC in ISO 8601, and what ``process_clock`` says.
        """
        clash = {"time", "seconds", "process"} & fields.keys()
        if clash or not kind or not cause:
            raise ValueError(f"event {kind!r}: give a kind, a cause, and no field named {sorted(clash) or 'time'}")
        record = {"time": utc_now(), **process_clock(), "kind": kind, **redacted({"cause": cause, **fields})}
        self.events.append(record)
        return record

    def write_coactivation(self, step: int, layer_names: Sequence[str], pairs: Any) -> None:
        """Replaces coactivation.json, as a whole: the newest step's counts of experts that were chosen together.

        Args:
            pairs: (M, E, E) int64, one table for each of the M layer names.
        """
        record = {"step": step, "layers": list(layer_names), "pairs": pairs}
        unfinished = self.path / f".coactivation.json.{os.getpid()}"
        unfinished.write_text(finite_json(record) + "\n", encoding="utf-8")
        unfinished.replace(self.coactivation)

    def rewind(self, step: int, *, cause: str) -> int:
        """Marks that the run goes on from ``step`` completed optimizer steps: later records so far no longer count.

        Call it on every resume and roll-back, before the first new record. Writes an event only if there is something
        to drop. Returns: how many steps were dropped.
        """
        dropped = {r["step"] for name in ("metrics", "ledger") for r in self.committed(name) if r["step"] > step}
        if dropped:
            self.event(REWIND, cause=cause, step=step, dropped_steps=len(dropped),
                       metrics_bytes=self.metrics.size(), ledger_bytes=self.ledger.size())  # fmt: skip
        return len(dropped)

    def committed(self, name: str) -> Iterator[dict[str, Any]]:
        """Records of ``metrics`` or ``ledger`` that are part of the run: one a step, the last written, in step order.

        Only one record is held in memory at a time, so a long run's loads do not have to fit.
        """
        path = {"metrics": self.metrics_path, "ledger": self.ledger_path}[name]
        rewinds = [(event.get(f"{name}_bytes", 0), event["step"])
                   for event in read_records(self.events_path) if event.get("kind") == REWIND]  # fmt: skip
        line_of_step = surviving(((offset, record["step"]) for offset, record in read_lines(path)), rewinds)
        if not line_of_step:
            return
        with path.open("rb") as file:
            for step in sorted(line_of_step):
                file.seek(line_of_step[step])
                yield json.loads(file.readline())

    def close(self) -> None:
        for file in (self.metrics, self.events, self.ledger, self.orders):
            file.close()


def surviving(lines: Iterable[tuple[int, int]], rewinds: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Which lines of metrics or ledger are part of the run: the byte offset of each step's line that counts.

    Args:
        lines: (byte offset, step) of all lines. rewinds: (bytes in the file at that time, step gone back to), in order.
    """
    line_of_step: dict[int, int] = {}
    waiting = list(rewinds)
    for offset, step in lines:
        while waiting and waiting[0][0] <= offset:
            _drop_after(line_of_step, waiting.pop(0)[1])
        line_of_step[step] = offset
    for _, step in waiting:
        _drop_after(line_of_step, step)
    return line_of_step


def _drop_after(line_of_step: dict[int, int], step: int) -> None:
    for later in [s for s in line_of_step if s > step]:
        del line_of_step[later]


def committed_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics, one record a step, without repeated and rolled-back ones; see ``RunFolder.committed``."""
    return list(run.committed("metrics"))


def committed_ledger(run: RunFolder) -> list[dict[str, Any]]:
    """The run's ledger, one record a step, without repeated and rolled-back ones; see ``RunFolder.committed``."""
    return list(run.committed("ledger"))


def problem(path: str | Path) -> str | None:
    """Why ``path`` cannot be a run's folder, in one sentence, or None when it is a run, is empty or is not there yet.

    Hidden files are overlooked: version control and file managers leave them in empty folders.
    """
    path = Path(path)
    if path.exists():
        if not path.is_dir():
            return f"run folder {path} is a file; give another --run, or move the file away"
        if RunFolder(path).is_run():
            return _not_writable(path)
        others = sorted(
            entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name != "identity.json"
        )
        if others:
            return (
                f"run folder {path} is not a run: it has no config.toml but holds {', '.join(others[:3])}"
                f"{'...' if len(others) > 3 else ''}; give another --run, or an empty or new folder"
            )
    ancestor = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), None)
    if ancestor is not None and not ancestor.is_dir():
        return f"run folder {path} cannot be made: {ancestor} is a file; give another --run"
    if ancestor is not None and not os.access(ancestor, os.W_OK):
        return f"run folder {path} cannot be made: {ancestor} is not writable; give another --run"
    return None


_REPLACED = ("config.toml", "coactivation.json", "identity.json")  # by renaming, for which the folder's rights count


def _not_writable(path: Path) -> str | None:
    """Why this user cannot go on with a run, of whose files some may be another user's."""
    folders = [path, *(path / name for name in ("logs", "checkpoints", "tensorboard") if (path / name).exists())]
    files = [
        file for folder in folders[:2] for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in _REPLACED
    ]  # fmt: skip
    closed = [folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]
    closed += [file for file in files if not os.access(file, os.R_OK | os.W_OK)]
    if not closed:
        return None
    more = f" and {len(closed) - 1} more of its files" if len(closed) > 1 else ""
    return (
        f"run folder {path}: {closed[0]} (of user {closed[0].stat().st_uid}){more} is not writable for user "
        f"{os.getuid()}; have its owner run `chmod -R g+w` on it and use umask 002 in a group's folder, or give "
        "another --run"
    )


@cache
def _opened() -> tuple[str, float]:
    """A name that no other process has, and when this process first asked for it."""
    return os.urandom(3).hex(), time.monotonic()


def process_clock() -> dict[str, Any]:
    """When something happened by this process' own clock, which never runs backwards, and whose clock that is.

    Returns: ``seconds`` since this process opened its first run; ``process``, which two starts never share.
    """
    name, opened = _opened()
    return {"seconds": round(time.monotonic() - opened, 3), "process": f"{os.getpid()}-{name}"}


def utc_now() -> str:
    """This moment as ISO 8601 in UTC with milliseconds, as the record files have it: 2026-01-31T12:00:00.000Z."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
