"""What every benchmark records beside its timings: machine, versions, median and spread; and how it is written down."""

import csv
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: median, least and greatest, and how many."""

    median: float
    least: float
    greatest: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, load, memory, system, Python, and the versions of packages (None where not installed)."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: what the platform says has to do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_record(folder: Path, name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes NAME.json (facts and rows) and NAME.csv (rows, Spreads flattened) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()} for row in rows]
    (folder / f"{name}.json").write_text(json.dumps({**facts, "rows": plain}, indent=1) + "\n", encoding="utf-8")
    flat = [_flat(row) for row in plain]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}_{name}": part for name, part in value.items()})
        else:
            flat[key] = value
    return flat
