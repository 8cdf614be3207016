"""What a resumed run may change, and what it may not: a pure comparison of two configurations."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config import Config, ConfigError, from_tables, read
from launch.runfolder import RunFolder
from launch.schema import show
from launch.telemetry import dotted
from parallel.roots import Root, quickly, readable, root_of, step_of

# Sections and keys that decide the model, the order of the data or the size of the step.
_FIXED_SECTIONS = ("model",)
_FIXED_KEYS = (
    "data.seq_len", "data.seed", "data.packing", "data.lanes", "data.window_shards", "data.mode",
    "data.weights", "data.curriculum",
    "train.global_batch_size", "train.seed",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """A run with a checkpoint: the configuration that it was last started with, and its newest committed folder."""

    config: Config
    newest: Root

    @property
    def step(self) -> int:
        """Steps that the newest checkpoint holds."""
        return step_of(self.newest)

    def fingerprint(self) -> str:
        """Of the dataset that it was trained on; empty when the manifest cannot be read, which loading will report."""
        try:
            return str(json.loads((self.newest / "manifest.json").read_text()).get("fingerprint", ""))
        except (OSError, ValueError):
            return ""


def checkpoint_root(config: Config, run: RunFolder) -> Root:
    """The folder or address of a run's checkpoints."""
    return root_of(config.checkpoint.dir, config.checkpoint.timeout_s) if config.checkpoint.dir else run.checkpoints


def saved_config(folder: Path, config: Config) -> SavedRun | None:
    """The run in `folder`, or None when it has no committed checkpoint.

    One that a crash left between two renames counts: the run will put it back. Where the folder is not a run yet, and
    its place for checkpoints has some, the newest one tells the configuration.

    Raises:
        ConfigError: its config.toml cannot be read, or the address does not answer.
    """
    run = RunFolder(folder)
    root = checkpoint_root(config, run)
    try:
        found = readable(quickly(root))
        if not found:
            return None
        if not run.is_run():
            return SavedRun(from_tables(json.loads((found[-1] / "manifest.json").read_text())["config"]), found[-1])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError([f"checkpoint.dir = {config.checkpoint.dir}: {error}"]) from error
    problems: list[str] = []
    saved = read(str(run.config), [], problems)
    if problems:
        raise ConfigError([f"{run.config}: {problem}" for problem in problems])
    return SavedRun(saved, found[-1])


def checkpoints_left(folder: Path, config: Config) -> Root | None:
    """The newest checkpoint that a run has in the place that it kept them in before, where that is another one now.

    Raises:
        ConfigError: its config.toml cannot be read, or the address does not answer.
    """
    run = RunFolder(folder)
    if not run.is_run():
        return None
    before = read(str(run.config), [], [])
    root = checkpoint_root(before, run)
    if str(root) == str(checkpoint_root(config, run)):
        return None
    try:
        found = readable(quickly(root))
    except OSError as error:
        raise ConfigError([f"checkpoint.dir was {before.checkpoint.dir}: {error}"]) from error
    return found[-1] if found else None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Every key whose value differs, as dotted key -> (old, new)."""
    before, after = dotted(asdict(old)), dotted(asdict(new))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def refused_changes(old: Config, new: Config, accepted: tuple[str, ...]) -> list[str]:
    """A sentence for every change that would make the continuation another run.

    accepted: keys or sections that the user accepts with --accept-change.
    """
    found = []
    for key, (before, after) in differences(old, new).items():
        fixed = key in _FIXED_KEYS or key.split(".")[0] in _FIXED_SECTIONS
        if fixed and not any(key == name or key.startswith(f"{name}.") for name in accepted):
            found.append(
                f"{key} = {show(after)} differs from the saved run's {show(before)}; give another --run, go back to "
                f"{show(before)}, or accept it with --accept-change {key}"
            )
    return found
