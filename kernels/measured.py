"""What was measured on this device, kept on disk: one JSON file for each device, versions and state of the kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_WARM_UP, _REPEATS = 2, 5


class MeasuredCache:
    """Answers by operation and key; written as soon as there is a new one.

    The file is replaced as a whole, so that a reader never sees half of it. Two processes that write at once may lose
    one of the two answers, which is then measured again.

    Args:
        folder: where the files lie; made when first written. One that cannot be written to costs a warning, and the
            measurements are made again in the next process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def forget(self) -> None:
        """Drop what is in memory; what is on disk is read again."""
        self._known.clear()

    def get(self, device: torch.device, op: str, key: tuple[object, ...]) -> Any | None:
        """The answer, None where nothing was measured."""
        name = _file_name(device)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name].get(_entry(op, key))

    def put(self, device: torch.device, op: str, key: tuple[object, ...], answer: Any) -> None:
        """Keep an answer (of what JSON can hold)."""
        name = _file_name(device)
        self._known[name] = self._read(name) | self._known.get(name, {}) | {_entry(op, key): answer}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._known[name], file, indent=1, sort_keys=True)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            warnings.warn(
                f"kernel measurements cannot be kept in {self.folder} ({error}): the next process measures again; "
                "make the folder writable",
                stacklevel=2,
            )

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # none yet, or damaged: what is missing is measured again
        return found if isinstance(found, dict) else {}


@functools.cache
def default_cache() -> MeasuredCache:
    """The one that operations use: the user's own, in ~/.cache/trimtab/kernels, until `keep_in` moves it; for a user
    without a home (a container's number without a name) in the folder for temporary files."""
    try:
        home = Path.home()
    except RuntimeError:
        return MeasuredCache(Path(tempfile.gettempdir()) / f"trimtab-kernels-{os.getuid()}")
    return MeasuredCache(home / ".cache" / "trimtab" / "kernels")


def keep_in(folder: Path) -> None:
    """Keep this process's measurements in another folder, with what is there already."""
    cache = default_cache()
    cache.folder = folder
    cache.forget()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after a warm-up, by the device's own clock."""
    for _ in range(_WARM_UP):
        call()
    times = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def may_measure(device: torch.device) -> bool:
    """Not while a CUDA graph is being captured: timing waits for the device."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _entry(op: str, key: tuple[object, ...]) -> str:
    return " ".join([op, *map(str, key)])


@functools.cache
def _file_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    whole = f"{name}-torch-{torch.__version__}-triton-{triton}-{sources.hexdigest()[:12]}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", whole) + ".json"
