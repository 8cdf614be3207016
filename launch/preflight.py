"""Everything that can be checked before a process group, Ray or even torch is started; all problems in one message."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.cores import usable_cores
from data.dataset import Description, describe
from data.errors import DataError
from data.pack import builtin_at, pack_builtin
from data.weighted import resolved
from launch import bounds, runfolder
from launch.config import (
    Config,
    ConfigError,
    Launcher,
    for_debug,
    layout_problems,
    no_heldout,
    read,
    secret_problems,
    world_size_for,
)
from launch.devices import device_problems, local_process_problems
from launch.identity import standing
from launch.resume import checkpoints_left, differences, refused_changes, saved_config
from launch.run_tokenizer import training_problems
from launch.schema import show
from parallel.remote import is_remote


@dataclass(frozen=True)
class Plan:
    """A run that may start: the resolved configuration, where it goes, how many ranks, what is already there.

    builtin: name of a built-in corpus that has still to be packed, else empty.
    done: the run has all its steps already.
    notes: sentences about what was adapted or reused, for people.
    insecure: the user takes a Ray cluster that asks nobody for a token.
    changes: of a run that goes on, every key whose value is another than before, as key -> (old, new).
    """

    config: Config
    run: Path
    launcher: Launcher
    world_size: int
    resume: str
    accepted: tuple[str, ...]
    builtin: str
    done: bool
    notes: tuple[str, ...]
    insecure: bool = False
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def check(
    source: str,
    assignments: list[str],
    *,
    run: str | None,
    launcher: Launcher,
    resume: str = "auto",
    accepted: list[str] | None = None,
    local_cluster: bool = False,
    mpi_size: int | None = None,
    insecure: bool = False,
    elsewhere: bool = False,
) -> Plan:
    """Reads and checks a run.

    Args:
        source, assignments: see `launch.config.read`.
        run: the run's folder; None is runs/NAME of the configuration.
        resume: auto, must or never.
        accepted: keys whose change against the saved run the user accepts.
        local_cluster: the Ray cluster will be started here, on this machine's cores.
        mpi_size: ranks that mpirun started.
        insecure: see `Plan`.
        elsewhere: the run is submitted to a cluster whose storage may not be this machine's: what lies under a path is
            left for the job to check.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    notes: list[str] = []
    config, world_size, unreadable = checked_config(
        source, assignments, launcher, problems, notes, mpi_size, read_data=not elsewhere
    )
    mixture = tuple(_absolute(path) for path in config.data.mixture)
    config = replace(config, data=replace(config.data, path=_absolute(config.data.path), mixture=mixture))
    if config.checkpoint.dir:
        config = replace(config, checkpoint=replace(config.checkpoint, dir=_checkpoint_dir(config.checkpoint.dir)))
    if local_cluster:
        problems += local_capacity_problems(config)
    if launcher in ("debug", "local"):
        problems += device_problems(config)
    if launcher == "local":
        problems += local_process_problems(config)
    folder = Path(run or Path("runs") / Path(source).stem).absolute()
    problems += passing_problems(folder, config)
    changes: dict[str, tuple[Any, Any]] = {}
    builtin, data, done = "", None, False
    if elsewhere:
        notes.append(f"paths: data.path = {config.data.path} and the run {folder} are checked by the job there")
    else:
        builtin, data = ("", None) if unreadable else _check_data(config, problems, notes)
        if data is not None:
            notes.append(_reusing(data))
        done = _check_run(folder, config, resume, tuple(accepted or ()), data, problems, notes, builtin, changes)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    keys = tuple(accepted or ())
    return Plan(config, folder, launcher, world_size, resume, keys, builtin, done, tuple(notes), insecure, changes)


def checked_config(
    source: str,
    assignments: list[str],
    launcher: Launcher,
    problems: list[str],
    notes: list[str],
    mpi_size: int | None,
    *,
    read_data: bool = True,
) -> tuple[Config, int, bool]:
    """Reads a configuration and checks it as a whole, without looking at folders, devices or what the data holds.

    A key that is refused keeps a legal value in what comes back, and rules that would be broken only for that are not
    said.

    Args:
        problems, notes: what is wrong and what was adapted is appended here.
        read_data: whether data.path is looked at for weighted sources.

    Returns:
        The configuration as the launcher will run it, its number of ranks, and whether data.path names a folder of
        weighted sources that cannot be read.
    """
    found: list[str] = []
    config, unreadable = read(source, assignments, found), False
    try:
        if read_data and bounds.can_be_compared(config.data):
            config = replace(config, data=resolved(config.data))
    except DataError as error:  # said once; the configuration is still checked
        unreadable = True
        found.append(str(error))
    found += without(config.problems(), found)
    config = bounds.mended(config)
    if launcher == "debug":
        adapted = for_debug(config)
        if adapted is not config:
            notes.append("debug: one process holds all experts (parallel.virtual_ranks would spread them)")
        config = adapted
    world_size = world_size_for(config, launcher, mpi_size)
    if launcher == "mpi":
        config = replace(config, cluster=replace(config.cluster, workers=world_size))
    found += without(layout_problems(config, launcher, world_size), found)
    found += secret_problems(asdict(config))
    problems += found
    return config, world_size, unreadable


def without(sentences: list[str], said: list[str]) -> list[str]:
    """Those sentences that do not name a key which was refused before: its value there is not the user's."""
    refused = {match[1] for text in said if (match := re.match(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+) = ", text))}
    return [text for text in sentences if not any(re.search(rf"(?<![.\w]){key}(?!\w)", text) for key in refused)]


def passing_problems(folder: Path, config: Config) -> list[str]:
    """Whether the run or its checkpoints would lie in a folder that Ray makes for one job and removes when it likes."""
    found = []
    for name, key in ((str(folder), "--run"), (config.checkpoint.dir, "checkpoint.dir")):
        if not name or is_remote(name):
            continue
        parts = Path(name).resolve().parts
        if any(pair == ("runtime_resources", "working_dir_files") for pair in pairwise(parts)):
            found.append(
                f"{key} {name} lies in a folder that Ray made for this job's code and removes when it likes, with the "
                f"checkpoints; give an absolute path on storage that stays, such as {key} /shared/runs/{folder.name}"
            )
    return found


def local_capacity_problems(config: Config) -> list[str]:
    """Whether this machine's cores can hold the workers of a local Ray cluster."""
    cores = usable_cores()
    wanted = config.cluster.workers * config.cluster.cpus_per_worker
    found = []
    if config.cluster.nodes > 1:
        found.append(
            f"cluster.nodes = {config.cluster.nodes}: a local Ray cluster is one node; use cluster.nodes=1, or "
            "--address of a larger cluster"
        )
    if wanted > cores:
        found.append(
            f"cluster.workers = {config.cluster.workers} with cluster.cpus_per_worker = "
            f"{config.cluster.cpus_per_worker} need {wanted} cores, and a local Ray cluster here has {cores}; "
            f"use cluster.workers={cores} or fewer, "
            "--address of a larger cluster, or --launcher local, which does not reserve cores"
        )
    return found


def _check_data(config: Config, problems: list[str], notes: list[str]) -> tuple[str, Description | None]:
    """Appends what is wrong with the data; returns the built-in corpus to pack, if any, and what is there."""
    path = config.data.path
    if config.data.mode == "stream":
        notes += _check_foreign(config, problems)
        return "", None
    if config.data.mixture:
        sources = [_check_dataset(config, source, problems) for source in config.data.mixture]
        notes += [_reusing(found) for found in sources if found is not None]
        _check_heldout(config, sources, problems)
        return "", None
    name = builtin_at(path)
    if name and not (Path(path) / "manifest.json").exists() and not (Path(path).exists() and any(Path(path).iterdir())):
        return name, None
    found = _check_dataset(config, path, problems)
    _check_heldout(config, [found], problems)
    return "", found


def _check_heldout(config: Config, found: list[Description | None], problems: list[str]) -> None:
    """Appends that a run which evaluates as it trains has nothing to evaluate."""
    if config.train.evaluate_every_steps > 0 and all(one is not None and not one.n_heldout for one in found):
        problems.append(no_heldout(config))


def _check_dataset(config: Config, path: str, problems: list[str]) -> Description | None:
    """Appends what is wrong with one packed dataset; returns what it is, where it can be used."""
    try:
        data = describe(path, config.data.remote())
    except DataError as error:
        problems.append(str(error))
        return None
    if data.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {data.vocab_size} tokens of {path} "
            f"({data.tokenizer}); use model.vocab_size={data.vocab_size} or more, or pack with a smaller tokenizer"
        )
    return data


def _reusing(data: Description) -> str:
    return f"data: reusing {data.path} ({data.n_tokens:,} tokens, {data.tokenizer})"


def _absolute(path: str) -> str:
    """A path from the root; addresses stay as they are."""
    return path if "://" in path or not path else str(Path(path).absolute())


def _checkpoint_dir(text: str) -> str:
    return text if is_remote(text) else _absolute(text.removeprefix("file://"))


def _check_foreign(config: Config, problems: list[str]) -> list[str]:
    """Appends what is wrong with plain tar files; returns notes, the first of which says what they cannot do."""
    from data.foreign import NOT_RESUMABLE, foreign_tokenizer
    from data.plain_tars import named, plain_tars, survey, total

    try:
        vocab_size = foreign_tokenizer(config.data).vocab_size
        files, others = plain_tars(config.data.path)
        contents = total(survey(files).values())
    except DataError as error:
        problems.append(str(error))
        return []
    if vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {vocab_size} tokens of data.tokenizer = "
            f"{config.data.tokenizer}; use model.vocab_size={vocab_size} or more"
        )
    notes = [f"data: {len(files)} tar files, NOT RESUMABLE: {NOT_RESUMABLE}", f"data: documents are {contents}"]
    if contents.empty:
        notes.append(f"data: {len(contents.empty)} tar files hold no member at all: {named(contents.empty)}")
    if others:
        notes.append(f"data: {len(others)} other entries of {config.data.path} are not read: {named(others)}")
    return notes


def _check_run(
    folder: Path,
    config: Config,
    resume: str,
    accepted: tuple[str, ...],
    data: Description | None,
    problems: list[str],
    notes: list[str],
    builtin: str = "",
    changes: dict[str, tuple[Any, Any]] | None = None,
) -> bool:
    """Appends what is wrong with the run's folder, and its changed keys; returns whether the run is complete."""
    wrong = runfolder.problem(folder)
    if wrong:
        problems.append(wrong)
        return False
    try:
        place = standing(folder, config, accepted)
        if place.problem:
            problems.append(place.problem)
            return False
        saved = saved_config(folder, config)
        left = checkpoints_left(folder, config) if saved is None else None
    except ConfigError as error:
        problems += error.problems
        return False
    notes += place.notes
    if left is not None:
        problems.append(
            f"checkpoint.dir = {config.checkpoint.dir or folder / 'checkpoints'} holds no checkpoint of this run, "
            f"whose newest is {left}; move or copy them there, go back to that place, or start afresh in another --run"
        )
        return False
    if saved is None:
        if resume == "must":
            problems.append(f"--resume must: {folder} has no committed checkpoint; use --resume auto, or another --run")
        return False
    if resume == "never":
        problems.append(
            f"--resume never: {folder} already has the checkpoint {saved.newest.name}; give another --run, or resume"
        )
        return False
    problems += refused_changes(saved.config, config, accepted)
    problems += training_problems(folder, config.data, builtin, accepted)
    trained_on = saved.fingerprint()
    if data is not None and trained_on and trained_on != data.fingerprint and not {"data", "data.path"} & set(accepted):
        problems.append(
            f"data.path = {data.path} holds another dataset (fingerprint {data.fingerprint[:12]}) than the run was "
            f"trained on ({trained_on[:12]}); give that one, another --run, or accept it with --accept-change data.path"
        )
    if config.data.mode == "stream" and saved.step < config.train.steps:
        problems.append(
            f'data.mode = "stream" cannot be resumed, and {folder} has the checkpoint {saved.newest.name}; give '
            "another --run to start afresh, or pack the data"
        )
    if saved.step >= config.train.steps:
        notes.append(
            f"run: {folder} is complete ({saved.step} steps), nothing is trained; train.steps={saved.step * 2} goes on "
            "from there, another --run starts afresh"
        )
        unused = [key for key in differences(saved.config, config) if key != "train.steps"]
        if unused:
            notes.append(f"run: these keys differ from the run's and were not used: {', '.join(unused)}")
        return True
    notes.append(f"run: resuming from {saved.newest}")
    found = differences(saved.config, config)
    notes += [f"run: {key} was {show(old)} and is {show(new)} from here on" for key, (old, new) in found.items()]
    if changes is not None:
        changes |= found
    return False


def pack_if_needed(plan: Plan, say: Callable[[str], None]) -> None:
    """Packs the built-in corpus that the run needs, with progress through `say(text)`, and checks its vocabulary.

    Raises:
        ConfigError: the packed vocabulary does not fit the model. DataError: packing failed.
    """
    if not plan.builtin:
        return
    say(f"data: packing the built-in corpus {plan.builtin!r} to {plan.config.data.path} (once)")
    packed = pack_builtin(plan.builtin, Path(plan.config.data.path).parent, progress=_progress(say))
    say(f"data: {packed}")
    if packed.manifest.vocab_size > plan.config.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size = {plan.config.model.vocab_size} is smaller than the {packed.manifest.vocab_size} "
                f"tokens of {plan.config.data.path}; use model.vocab_size={packed.manifest.vocab_size} or more"
            ]
        )


def _progress(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """A progress callback (stage, done, total) that says something at the start of each stage."""
    seen: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            say(f"data:   {stage} ({total:,})")

    return report
