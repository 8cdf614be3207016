"""What a run was started on and with, for its start event: parameters, hardware, versions, git commit, date."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from launch.bench_record import machine, version
from model.config import ModelConfig
from model.count import count_parameters

ROOT = Path(__file__).resolve().parent.parent


def start_facts(model: ModelConfig, device: torch.device, launcher: str) -> dict[str, Any]:
    """The facts as rank 0 sees them.

    Returns:
        parameters and active_parameters (prediction modules included, those that one token uses), hardware, versions,
        commit (None where the project lies in no git repository of its own) and date (UTC, to the second).
    """
    count = count_parameters(model)
    hardware = {name: value for name, value in machine(()).items() if name not in ("packages", "python", "load")}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    packages = ["torch", *(["deepspeed"] if launcher != "debug" else []), *(["ray"] if launcher == "ray" else [])]
    return {
        "parameters": count.total,
        "active_parameters": count.active + count.active_mtp,
        "hardware": hardware,
        "versions": {"python": machine(())["python"], **{name: version(name) for name in packages}},
        "commit": commit(ROOT),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_words(facts: dict[str, Any]) -> str:
    """The line about the model's size: `model: 4,931,712 parameters, 1,982,592 of them active for a token`."""
    return f"model: {facts['parameters']:,} parameters, {facts['active_parameters']:,} of them active for a token"


def commit(root: Path) -> str | None:
    """The git commit that is checked out in a folder, with `-dirty` where tracked files were changed since."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a repository on a storage that hangs
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
