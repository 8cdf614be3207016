"""Which runs `trimtab bench scaling` makes, checked as a whole before the first of them starts."""

import argparse
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import preflight
from launch.config import ConfigError, read
from launch.preflight import Plan

STRONG, WEAK = MODES = ("strong", "weak")
NATURAL, EVEN = ROUTINGS = ("natural", "even")
NEVER = 10**9  # steps
OWN_KEYS = {
    "parallel.ep_size": "--ep-size", "cluster.workers": "--sizes", "cluster.nodes": "--ranks-per-node",
    "cluster.threads_per_worker": "--threads", "train.global_batch_size": "--global-batch",
    "train.micro_batch_size": "--micro-batch", "train.steps": "--steps and --warm-up",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: `size` ranks, `batch` sequences a step, which routing, and which repeat it is."""

    size: int
    batch: int
    routing: str
    repeat: int

    @property
    def name(self) -> str:
        """Of its files, and in the report."""
        return f"{self.size}-ranks-{self.batch}-sequences-{self.routing}-{self.repeat + 1}"


def batch_of(mode: str, size: int, base: int, base_batch: int) -> int:
    """Sequences of a step: strong scaling keeps them, weak scaling keeps each rank's; the base is the same run.

    Raises:
        ValueError: they cannot be spread.
    """
    if mode == STRONG:
        return base_batch
    if base_batch * size % base:
        raise ValueError(
            f"--global-batch {base_batch} at --base {base} is not a whole number of sequences at {size} ranks"
        )
    return base_batch * size // base


def runs(
    sizes: Sequence[int], modes: Sequence[str], routings: Sequence[str], base: int, base_batch: int, repeats: int
) -> list[Run]:
    """All runs in the order in which they are made: sizes in turn, every other repeat backwards, so that what changes
    in the machine with time does not fall on one size alone."""
    shapes = sorted({(size, batch_of(mode, size, base, base_batch)) for mode in modes for size in sizes})
    found = []
    for repeat in range(repeats):
        one = [Run(size, batch, routing, repeat) for size, batch in shapes for routing in routings]
        found += one if repeat % 2 == 0 else one[::-1]
    return found


@dataclass(frozen=True)
class Layout:
    """What is the same in all runs: the user's configuration, and the options that the runs are made from.

    ep_size: experts are spread over so many ranks; at a size that it does not divide, over the largest divisor of both.
    ranks_per_node: on Ray, 0 for one node.
    """

    source: str
    assignments: tuple[str, ...]
    launcher: str
    ep_size: int
    micro_batch: int
    threads: int
    ranks_per_node: int
    steps: int

    def ep_at(self, size: int) -> int:
        """The expert-parallel size of a run."""
        return math.gcd(self.ep_size, size)

    def nodes_at(self, size: int) -> int:
        """The Ray nodes of a run."""
        return max(1, size // self.ranks_per_node) if self.ranks_per_node else 1

    def assignments_of(self, size: int, batch: int) -> list[str]:
        """The user's, and those that make the run."""
        return [
            *self.assignments,
            f"parallel.ep_size={self.ep_at(size)}",
            f"cluster.workers={size}",
            f"cluster.nodes={self.nodes_at(size)}",
            f"cluster.threads_per_worker={self.threads}",
            f"train.global_batch_size={batch}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.steps={self.steps}",
            f"checkpoint.every_steps={NEVER}",
            f"telemetry.heatmap_every_steps={NEVER}",
            'telemetry.console="off"',
        ]


def check_all(options: argparse.Namespace) -> tuple[list[Run], Layout, dict[tuple[int, int], Plan]]:
    """The runs, and a checked plan of every (size, batch).

    Raises:
        ConfigError: everything that is wrong, each with the size that it is wrong at.
    """
    problems = _option_problems(options)
    config = read(options.preset, list(options.set), problems)
    base = options.base or min(options.sizes, default=1)
    if base not in options.sizes:
        problems.append(f"--base {base} is not among --sizes {' '.join(map(str, options.sizes))}; add it")
    if problems:
        raise ConfigError(problems)
    layout = Layout(
        options.preset, tuple(options.set), options.launcher, options.ep_size or config.parallel.ep_size,
        options.micro_batch, options.threads, options.ranks_per_node, options.warm_up + options.steps,
    )  # fmt: skip
    if config.model.n_routed_experts % layout.ep_size:
        problems.append(
            f"--ep-size {layout.ep_size} does not divide model.n_routed_experts = {config.model.n_routed_experts}"
        )
    batch = options.global_batch or options.micro_batch * max(options.sizes)
    plans: dict[tuple[int, int], Plan] = {}
    wanted: list[Run] = []
    try:
        wanted = runs(options.sizes, options.modes, options.routings, base, batch, options.repeats)
    except ValueError as error:
        problems.append(str(error))
    nowhere = str(options.out / "runs" / "none")  # no run is looked for: each starts afresh
    for size, sequences in sorted({(run.size, run.batch) for run in wanted}):
        try:
            plans[size, sequences] = preflight.check(
                options.preset, layout.assignments_of(size, sequences), run=nowhere, launcher=options.launcher
            )
        except ConfigError as error:
            problems += [f"at {size} ranks, {sequences} sequences a step: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return wanted, layout, plans


def _option_problems(options: argparse.Namespace) -> list[str]:
    found = []
    if any(size < 1 for size in options.sizes) or len(set(options.sizes)) < len(options.sizes):
        found.append(f"--sizes {' '.join(map(str, options.sizes))}: each must be at least 1 and given once")
    least = {"--repeats": 1, "--steps": 1, "--warm-up": 1, "--micro-batch": 1, "--threads": 1}
    for name, limit in least.items():
        value = getattr(options, name[2:].replace("-", "_"))
        if value < limit:
            found.append(f"{name} {value} must be at least {limit}")
    for name in ("global_batch", "ep_size", "ranks_per_node"):
        if getattr(options, name) < 0:
            found.append(f"--{name.replace('_', '-')} {getattr(options, name)} must not be negative")
    per_node = options.ranks_per_node
    if per_node > 0:
        if options.launcher != "ray":
            found.append("--ranks-per-node is for --launcher ray; --launcher local has one node")
        found += [
            f"--sizes {size} is neither at most nor a multiple of --ranks-per-node {per_node}"
            for size in options.sizes if size > per_node and size % per_node
        ]  # fmt: skip
    needed = ("deepspeed", "ray") if options.launcher == "ray" else ("deepspeed",)
    found += [
        f"--launcher {options.launcher} needs {name}, which is not installed; run `make setup`"
        for name in needed if importlib.util.find_spec(name) is None
    ]  # fmt: skip
    for assignment in options.set:
        key = assignment.partition("=")[0].strip()
        if key in OWN_KEYS:
            found.append(f"--set {assignment}: the benchmark sets {key} itself; use {OWN_KEYS[key]}")
    return found


def oversubscribed(layout: Layout, size: int, cores: int) -> str:
    """What has to be said of a size whose ranks do not have a core for each of their threads; else nothing."""
    here = size // layout.nodes_at(size)
    if here * layout.threads <= cores:
        return ""
    threads = "" if layout.threads == 1 else f" of {layout.threads} threads"
    return f"{here} processes{threads} on {cores} cores: oversubscribed"


def usable_cores() -> int:
    """Of this machine, for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_path(out: Path, run: Run) -> Path:
    """Where a run's result is kept, so that the same command goes on after an interruption."""
    return out / "results" / f"{run.name}.json"
