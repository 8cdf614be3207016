"""Copies what a job needs from the project into a folder of its own, to be sent to the cluster."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

ROOMS = ("cluster", "data", "kernels", "launch", "model", "parallel")
FILES = ("trimtab.py", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def stage(
    root: Path,
    destination: Path,
    *,
    folders: Sequence[str] = ROOMS,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Copies the folders and the root's files into destination, adds files with given text, returns destination.

    Args:
        extra: text by relative path, for example {"config.toml": "..."}.

    Raises:
        ValueError: an extra path is absolute or leads out of destination.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        shutil.copytree(root / folder, destination / folder, ignore=LEFT_OUT, dirs_exist_ok=True)
    for name in FILES:
        if (root / name).exists():
            shutil.copy2(root / name, destination / name)
    for name, text in (extra or {}).items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"extra file {name!r} leads out of the job's folder; use a relative path below it")
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return destination
