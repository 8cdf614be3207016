"""The one configuration: every room's section, read from TOML, checked as a whole before anything starts."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cluster.config import ClusterConfig
from cluster.redact import secrets_in
from data.config import DataConfig
from launch import bounds
from launch.faults import FaultsConfig, rank_problems
from launch.guard_config import GuardConfig
from launch.schema import override, parse, show, to_toml
from model.config import ModelConfig
from parallel.config import BalanceConfig, OptimizerConfig, ParallelConfig
from parallel.layout import divisors
from parallel.remote import address_problems

Launcher = Literal["debug", "local", "ray", "mpi"]
LAUNCHERS: tuple[Launcher, ...] = ("debug", "local", "ray", "mpi")
PRESETS = Path(__file__).resolve().parent / "presets"


class ConfigError(ValueError):
    """One or more problems with the configuration; `problems` holds a sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        kinds = {_kind(problem) for problem in problems}
        about = f" with {kinds.pop()}" if len(kinds) == 1 else ""
        super().__init__(f"{count}{about}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _kind(problem: str) -> str:
    """What a sentence is about, for the heading over it."""
    if problem.startswith("--"):
        return "the command's options"
    if " is not a run: " in problem or problem.startswith("run folder"):
        return "the run's folder"
    if problem.startswith("CONFIG") or problem.partition(".")[0] in Config.__dataclass_fields__:
        return "the configuration"
    return "the configuration" if " is not a known key" in problem or "key.path=value" in problem else "the input"


@dataclass(frozen=True)
class TrainConfig:
    """The length and shape of training.

    steps: optimizer steps in all.
    global_batch_size: sequences per optimizer step over all ranks.
    micro_batch_size: sequences per rank and forward.
    seed: seed of the weights' start values.
    precision: number format of the computation; `bf16` keeps fp32 master weights beside it.
    mtp_loss_weight: weight of the mean multi-token-prediction loss (DeepSeek-V3: 0.3, later 0.1).
    evaluate_every_steps: optimizer steps between two evaluations of the held-out documents while the run goes on, whose
        loss forms a curve; 0 evaluates at the end alone. The run itself is the same with and without them.
    finite_checks: check every tensor that crosses a layer and name the first that is not finite (slow; for debugging).
    """

    steps: Annotated[int, "[1, 1e9]"] = 200
    global_batch_size: Annotated[int, "[1, 1e9]"] = 16
    micro_batch_size: Annotated[int, "[1, 1e6]"] = 8
    seed: Annotated[int, "[0, 9223372036854775808)"] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    mtp_loss_weight: Annotated[float, "[0, 1000]"] = 0.3
    evaluate_every_steps: Annotated[int, "[0, 1e9]"] = 0
    finite_checks: bool = False

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        for key in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, key) < 1:
                found.append(f"train.{key} = {getattr(self, key)} must be at least 1")
        if self.evaluate_every_steps < 0:
            found.append(
                f"train.evaluate_every_steps = {self.evaluate_every_steps} must not be negative; use 0 to evaluate at "
                "the end alone"
            )
        if self.mtp_loss_weight < 0:
            found.append(f"train.mtp_loss_weight = {self.mtp_loss_weight} must not be negative; 0 switches it off")
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where the run is saved.

    every_steps: optimizer steps between two checkpoints; another is saved at the end.
    keep: so many of the newest checkpoints stay; 0 keeps all.
    dir: where they go, a folder or an address that fsspec knows (s3://bucket/runs/a), of this run alone; empty means
        `checkpoints` in the run's folder. Credentials are not part of it: see docs/security.md.
    keep_every_steps: every multiple of so many steps stays besides; 0 keeps none besides.
    asynchronous: training goes on while files are written; else it waits. The run is the same.
    max_failed_saves: a save that fails is an alarm; so many in a row stop the run.
    timeout_s: the longest wait for a save, and for one file of an address, in seconds.
    """

    every_steps: Annotated[int, "[1, 1e9]"] = 100
    keep: Annotated[int, "[0, 1e9]"] = 2
    dir: str = ""
    keep_every_steps: Annotated[int, "[0, 1e9]"] = 0
    asynchronous: bool = True
    max_failed_saves: Annotated[int, "[1, 1e9]"] = 3
    timeout_s: Annotated[float, "[0.001, 1e7]"] = 1800.0

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        for key in ("every_steps", "max_failed_saves"):
            if getattr(self, key) < 1:
                found.append(f"checkpoint.{key} = {getattr(self, key)} must be at least 1")
        if self.keep < 0:
            found.append(f"checkpoint.keep = {self.keep} must not be negative; 0 keeps all")
        if self.keep_every_steps < 0 or (self.every_steps >= 1 and self.keep_every_steps % self.every_steps):
            found.append(
                f"checkpoint.keep_every_steps = {self.keep_every_steps} must be a multiple of checkpoint.every_steps = "
                f"{self.every_steps}, or 0 to keep none besides the newest"
            )
        found += address_problems("checkpoint.dir", self.dir)
        if not 0 < self.timeout_s < float("inf"):
            found.append(f"checkpoint.timeout_s = {self.timeout_s} must be more than 0 seconds")
        return found


@dataclass(frozen=True)
class TelemetryConfig:
    """What is shown and watched.

    heatmap_every_steps: optimizer steps between two heat maps of the experts' loads.
    console: how progress is shown: `live` redraws a bar, `plain` writes lines, `off` shows nothing, `auto` is live on a
        terminal and plain elsewhere.
    straggler_ratio: an event is written when a rank needs more than so many times the own time (without waiting) of the
        middle rank; 0 does not look.
    straggler_window: steps over whose median that is judged.
    """

    heatmap_every_steps: Annotated[int, "[1, 1e9]"] = 20
    console: Literal["auto", "live", "plain", "off"] = "auto"
    straggler_ratio: Annotated[float, "0 or (1, 1e6]"] = 1.5
    straggler_window: Annotated[int, "[3, 100000]"] = 20

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.heatmap_every_steps < 1:
            found.append(f"telemetry.heatmap_every_steps = {self.heatmap_every_steps} must be at least 1")
        if self.straggler_ratio != 0 and not 1 < self.straggler_ratio < float("inf"):
            found.append(
                f"telemetry.straggler_ratio = {self.straggler_ratio} must be more than 1, the ratio of ranks that are "
                "alike; use 1.5, or 0 to look for no stragglers"
            )
        if self.straggler_window < 3:
            found.append(
                f"telemetry.straggler_window = {self.straggler_window} is too few steps to tell a slow rank from a "
                "slow step; use 3 or more"
            )
        return found


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def problems(self) -> list[str]:
        """Every broken rule inside the sections."""
        found: list[str] = []
        for name in self.__dataclass_fields__:
            found += section_problems(getattr(self, name), name)
        return found

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step at a world size that `layout_problems` accepts."""
        return self.train.global_batch_size // (self.train.micro_batch_size * world_size)


def section_problems(section: Any, name: str) -> list[str]:
    """Every broken rule of one section: its own rules, and values outside the ranges that its keys are declared with.

    A section's own rules compare and divide its numbers: where one is not finite or beyond its upper limit, only the
    ranges are checked.
    """
    outside = bounds.problems(section, name)
    own = section.problems() if bounds.can_be_compared(section) else []
    said = {problem.partition(" ")[0] for problem in own}
    return own + [problem for key, problem in outside.items() if key not in said]


def preset_names() -> list[str]:
    """The names of the presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read(source: str, assignments: list[str], problems: list[str]) -> Config:
    """Reads a preset or a TOML file and applies the command line's assignments.

    Args:
        source: a preset's name or the path of a TOML file; a file may start from a preset with `preset = "NAME"`.
        assignments: `key.path=value` each.
        problems: everything wrong with keys and types is appended here.

    Raises:
        ConfigError: the source itself cannot be read.
    """
    data = _tables(source)
    for assignment in assignments:
        try:
            override(data, assignment)
        except ValueError as error:
            problems.append(str(error))
    return parse(Config, data, "", problems)


def _tables(source: str, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a preset or file over those of the preset that it starts from; `inside`: files that led here."""
    path = PRESETS / f"{source}.toml"
    try:
        if source != Path(source).name or not path.is_file():
            path = Path(source)
        if not path.is_file():
            raise ConfigError(
                [f"CONFIG = {source!r} is neither a preset ({', '.join(preset_names())}) nor a file; give one of them"]
            )
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"CONFIG = {source!r} cannot be read: {error.strerror}; give a readable file"]) from error
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise ConfigError([f"{path} is not TOML: {error}"]) from error
    base = data.pop("preset", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError([f"{path}: preset = {show(base)} must be the name of a preset or file"])
    if path.resolve() in inside:
        raise ConfigError([f"{path}: preset = {show(base)} leads back to this file; start from a preset instead"])
    merged = _tables(base, (*inside, path.resolve()))
    for section, table in data.items():
        if isinstance(table, dict) and isinstance(merged.get(section), dict):
            merged[section] = merged[section] | table
        else:
            merged[section] = table
    return merged


def from_tables(data: dict[str, Any]) -> Config:
    """A configuration from nested tables that were resolved before; raises ConfigError if anything is unknown."""
    problems: list[str] = []
    config = parse(Config, data, "", problems)
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Config) -> str:
    """The whole resolved configuration as TOML."""
    return to_toml(config)


def world_size_for(config: Config, launcher: Launcher, mpi_size: int | None = None) -> int:
    """How many ranks a launcher will start."""
    if launcher == "debug":
        return config.parallel.virtual_ranks
    return mpi_size if launcher == "mpi" and mpi_size else config.cluster.workers


def for_debug(config: Config) -> Config:
    """The same run in one process: without virtual ranks to spread them over, that process holds all experts."""
    if config.parallel.virtual_ranks == 1 and config.parallel.ep_size != 1:
        return replace(config, parallel=replace(config.parallel, ep_size=1))
    return config


def layout_problems(config: Config, launcher: Launcher, world_size: int) -> list[str]:
    """Every rule that ties sections together for a world of `world_size` ranks."""
    model, parallel, train, data = config.model, config.parallel, config.train, config.data
    found = []
    if parallel.ep_size >= 1 and model.n_routed_experts % parallel.ep_size:
        found.append(
            f"model.n_routed_experts = {model.n_routed_experts} cannot be split over parallel.ep_size = "
            f"{parallel.ep_size}; use an ep_size among {_some(divisors(model.n_routed_experts))}"
        )
    key = {"debug": "parallel.virtual_ranks", "mpi": "the MPI world"}.get(launcher, "cluster.workers")
    if parallel.ep_size >= 1 and world_size % parallel.ep_size:
        found.append(
            f"{key} = {world_size} ranks cannot be cut into groups of parallel.ep_size = {parallel.ep_size}; "
            f"use an ep_size among {_some(divisors(world_size))}, or a multiple of {parallel.ep_size} ranks"
        )
    if parallel.virtual_ranks > 1 and launcher != "debug":
        found.append(
            f"parallel.virtual_ranks = {parallel.virtual_ranks} are threads of one process, for --launcher debug; "
            f"with --launcher {launcher} set it to 1 and choose cluster.workers"
        )
    per_micro_step = train.micro_batch_size * world_size
    if per_micro_step >= 1 and train.global_batch_size % per_micro_step:
        nearest = max(1, round(train.global_batch_size / per_micro_step)) * per_micro_step
        found.append(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of train.micro_batch_size = "
            f"{train.micro_batch_size} times {world_size} ranks ({key}); use {nearest}, or a smaller micro_batch_size"
        )
    if data.lanes >= 1 and data.lanes % world_size:
        found.append(
            f"data.lanes = {data.lanes} cannot be dealt to {world_size} ranks ({key}); use a multiple of {world_size}"
        )
    found += rank_problems(config.faults.inject, world_size)
    if config.checkpoint.dir.startswith("memory://") and launcher != "debug":
        found.append(
            f"checkpoint.dir = {config.checkpoint.dir} is the memory of one process, for --launcher debug; with "
            f"--launcher {launcher} give a folder or an address that all nodes reach"
        )
    if data.seq_len > model.max_position_embeddings:
        found.append(
            f"data.seq_len = {data.seq_len} is longer than model.max_position_embeddings = "
            f"{model.max_position_embeddings}; raise the latter or shorten the sequences"
        )
    if config.guard.rollback_steps and data.mode == "stream":
        found.append(
            f"guard.rollback_steps = {config.guard.rollback_steps} goes back in the data, which data.mode = "
            '"stream" cannot; use 0, or pack the data'
        )
    if train.evaluate_every_steps and data.mode == "stream":
        found.append(
            f"train.evaluate_every_steps = {train.evaluate_every_steps} needs held-out documents, which plain tar "
            'files (data.mode = "stream") do not have; use 0, or pack the data'
        )
    if config.balance.moves_bias and not model.uses_bias:
        found.append(
            f'balance.rule = "{config.balance.rule}" moves a bias that model.topk_method = "{model.topk_method}" '
            'does not read; use balance.rule = "aux_loss" or "none", or topk_method = "noaux_tc"'
        )
    if train.precision == "bf16" and parallel.zero_stage == 0 and launcher != "debug":
        found.append(
            'train.precision = "bf16" needs fp32 master weights, which parallel.zero_stage = 0 does not keep; '
            "use zero_stage 1, 2 or 3"
        )
    return found


def no_heldout(config: Config) -> str:
    """That a run cannot evaluate as it trains, and what to do."""
    where = ", ".join(config.data.mixture) or config.data.path
    return (
        f"train.evaluate_every_steps = {config.train.evaluate_every_steps} needs held-out documents, and {where} holds "
        "none; use 0, or pack the data with a share of them (`trimtab data pack --heldout 0.02`)"
    )


def secret_problems(tables: Mapping[str, Any]) -> list[str]:
    """A sentence for every text that holds a secret: what is configured is copied to files, checkpoints and figures."""
    return [
        f"{path} holds a secret (see docs/security.md for what counts as one); keep it out of the configuration: the "
        "storage libraries find credentials in the environment (AWS_SECRET_ACCESS_KEY, FSSPEC_S3_SECRET, ...) or in "
        "files of their own"
        for path in secrets_in(tables)
    ]


def refuse_secrets(tables: Mapping[str, Any]) -> None:
    """Raises ConfigError where `secret_problems` finds any."""
    if problems := secret_problems(tables):
        raise ConfigError(problems)


def _some(numbers: list[int]) -> str:
    shown = numbers if len(numbers) <= 12 else numbers[:10] + numbers[-2:]
    return ", ".join(str(number) for number in shown)
