"""A Hugging Face folder of DeepSeek-V3 or V2 as a run that training continues from, at any layout.

The folder is checked as a whole first; then tensor after tensor goes straight into the run's first checkpoint, a few
megabytes at a time. Nothing of the folder is run, and no pickle is opened.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.tokenizer import Tokenizer
from launch import runfolder
from launch.config import Config, ConfigError, dump, for_debug, from_tables, layout_problems, read, section_problems
from launch.hf_folder import HfFolder, open_folder
from launch.hf_state import MOMENTS, SavedState, read_state
from launch.hf_weights import HfWeights
from launch.run_tokenizer import (
    FILE,
    FOLDER,
    data_tokenizer,
    keep_published,
    mismatch,
    other_end,
    read_published,
    unread_tokenizers,
)
from launch.runfolder import RunFolder
from launch.schema import override, parse, show
from model.config import ModelConfig
from model.hf_config import from_hf, prediction_layer_problem
from model.hf_names import logical_tensors, prediction_layers
from parallel.whole_checkpoint import StateTensor, write_whole

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportOptions:
    """How a folder is imported.

    config: a preset or a TOML file for everything but the model; "" takes the exported run's own, where it was kept.
    assignments: `key.path=value` each, on top; the model's are the folder's.
    weights_only: leave the optimizer's state behind. ignore_auto_map: see `open_folder`.
    shard_gb: largest file of the checkpoint, in 10^9 bytes.
    other_tokenizer: leave the folder's tokenizer behind: the model is trained on the ids of the data's from now on.
    """

    config: str = ""
    assignments: tuple[str, ...] = ()
    weights_only: bool = False
    ignore_auto_map: bool = False
    shard_gb: float = 4.0
    other_tokenizer: bool = False


def import_folder(source: Path, out: Path, options: ImportOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Makes the run under a draft name and renames it when it is whole.

    Returns:
        What was made: run, step, optimizer (whether its state came along), parameters, notes.

    Raises:
        ConfigError: everything that is wrong with the folder, the configuration or the run's place.
        CheckpointError, OSError: the disk has no room, or refused.
    """
    problems = [f"{out} is already there; give another --out"] if out.exists() else []
    problems += [] if (wrong := runfolder.problem(out)) is None or problems else [wrong]
    if not options.shard_gb > 0:
        problems.append(f"--shard-gb = {options.shard_gb} must be above 0")
    if problems:
        raise ConfigError(problems)
    folder = open_folder(source, options.ignore_auto_map)
    state = None if options.weights_only else read_state(source)
    notes = list(folder.notes)
    model = _model(folder, problems, notes)
    config = _config(options, model, state, problems)
    if model is None or problems:
        raise ConfigError([f"{source / 'config.json'}: {one}" if model is None else one for one in problems])
    tokenizer = None if options.other_tokenizer else _tokenizer(source, out, config, problems, notes)
    if options.other_tokenizer:
        notes.append(
            "the folder's tokenizer is left behind, as --other-tokenizer asks: the data's ids are new to the model"
        )
    weights = HfWeights(folder, model, problems)
    shapes = {one.name: one.shape for one in logical_tensors(model)}
    biases = {f"{layer}.mlp.gate.e_score_correction_bias" for layer in model.moe_layers}
    trained = {name: shape for name, shape in shapes.items() if name not in biases}
    problems += state.check(trained) if state else []
    if not problems:
        problems += weights.differing_copies()
    if problems:
        raise ConfigError(problems)
    tensors = list(_tensors(weights, state, shapes, trained, sorted(biases - shapes.keys()), model))
    step = state.step if state else 0
    extra = _extra(source, folder, config, state)
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        run = RunFolder(draft)
        run.create(dump(config))
        if tokenizer is not None:
            keep_published(source, draft, tokenizer, folder.config)
        write_whole(run.checkpoints, step, tensors, extra, int(options.shard_gb * 1e9), progress)
        run.event(
            "import", cause=f"from {source}", step=step, model_type=folder.config["model_type"],
            optimizer=state is not None, notes=notes,
        )  # fmt: skip
        run.close()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {
        "run": str(out),
        "step": step,
        "optimizer": state is not None,
        "parameters": sum(prod(shape) for shape in trained.values()),
        "notes": notes,
    }


def _model(folder: HfFolder, problems: list[str], notes: list[str]) -> ModelConfig | None:
    """The model that config.json describes; None, with problems, where it is none of ours."""
    before = len(problems)
    values = from_hf(folder.config, problems)
    if len(problems) > before:
        return None
    model: ModelConfig = parse(ModelConfig, values, "model", problems)
    if len(problems) > before:
        return None
    problems += section_problems(model, "model")
    if len(problems) > before:
        return None
    held = prediction_layers(folder.file_of, model.num_hidden_layers)
    disagreement = prediction_layer_problem(folder.config, held)
    if disagreement is not None and any(".eh_proj." in name for name in folder.file_of):
        problems.append(disagreement)
        return None
    if model.num_nextn_predict_layers and not held:
        notes.append(
            f"config.json speaks of {model.num_nextn_predict_layers} prediction layer(s) and the folder holds none "
            "(transformers does not save them): imported without"
        )
        model = replace(model, num_nextn_predict_layers=0)
    return model


def _tokenizer(source: Path, out: Path, config: Config, problems: list[str], notes: list[str]) -> Tokenizer | None:
    """The folder's own tokenizer, which the run keeps; appends what stands against it and against the data's."""
    try:
        own = read_published(source)
    except DataError as error:
        problems.append(f"{error}; --other-tokenizer leaves the folder's tokenizer behind")
        return None
    if own is None:
        others = unread_tokenizers(source)
        there = f"{', '.join(others)} cannot be read" if others else "there is none of another kind either"
        notes.append(
            f"the folder has no tokenizer.json ({there}): the run takes the data's tokenizer, and whether that is the "
            "model's cannot be checked"
        )
        return None
    if own.vocab_size > config.model.vocab_size:
        problems.append(
            f"{source / FILE} has {own.vocab_size} tokens and config.json vocab_size = {config.model.vocab_size}; take "
            "the files that belong together, or leave the tokenizer behind with --other-tokenizer"
        )
        return None
    kept = out / FOLDER / FILE
    try:
        theirs = data_tokenizer(config.data)
    except DataError as error:
        notes.append(f"the data is not there yet ({error}); pack it with the model's tokenizer: --tokenizer {kept}")
        return own
    wrong = mismatch(f"data.path = {config.data.path}", theirs, source / FILE, own)
    if wrong is not None:
        problems.append(
            f"{wrong}; pack the data with the model's: trimtab data pack SOURCE --tokenizer {source / FILE}, and name "
            "it with data.path=DIR; --other-tokenizer trains the model on the data's ids all the same"
        )
    elif (told := other_end(theirs, own)) is not None:
        notes.append(told)
    return own


def _config(options: ImportOptions, model: ModelConfig | None, state: SavedState | None, problems: list[str]) -> Config:
    """The run's configuration: the folder's model, and the rest as asked for."""
    config = Config()
    tables: dict[str, Any] = {}
    for assignment in options.assignments:
        if assignment.split("=")[0].strip().split(".")[0] == "model":
            problems.append(f"{assignment}: the model is what the folder holds; leave it out")
    if options.config:
        config = read(options.config, list(options.assignments), problems)
    elif state is not None:
        tables = dict(state.manifest["config"])
        for assignment in options.assignments:
            try:
                override(tables, assignment)
            except ValueError as error:
                problems.append(str(error))
        config = from_tables(tables)
        if model is not None and config.model != model:
            own, theirs = asdict(config.model), asdict(model)
            changed = [f"{key} {show(theirs[key])} for {show(own[key])}" for key in own if own[key] != theirs[key]]
            problems.append(f"config.json was changed since the export: {', '.join(changed)}; undo it")
    else:
        problems.append(
            "--config is needed: a preset or a TOML file for everything but the model, for example --config debug"
        )
    if model is not None:
        config = replace(config, model=model)
    if config.checkpoint.dir:
        problems.append(f"checkpoint.dir = {show(config.checkpoint.dir)}: an import is written into the run's folder")
    if problems or model is None:
        return config
    problems += config.problems()
    if not problems:
        one = for_debug(config)
        problems += layout_problems(one, "debug", one.parallel.virtual_ranks)
    return config


def _tensors(
    weights: HfWeights,
    state: SavedState | None,
    shapes: dict[str, tuple[int, ...]],
    trained: dict[str, tuple[int, ...]],
    absent_biases: list[str],
    model: ModelConfig,
) -> Iterator[StateTensor]:
    for name, shape in shapes.items():
        yield StateTensor(name, shape, "weight", partial(weights.chunks, name))
        if state is not None and name in trained:
            for kind in MOMENTS:
                yield StateTensor(name, shape, kind, partial(state.chunks, name, kind, prod(shape)))
    for name in absent_biases:  # a softmax router has a bias that nothing reads
        yield StateTensor(name, (model.n_routed_experts,), "weight", partial(_zeros, model.n_routed_experts))


def _zeros(n: int) -> Iterator[Tensor]:
    yield torch.zeros(n)


def _extra(source: Path, folder: HfFolder, config: Config, state: SavedState | None) -> dict[str, Any]:
    """The checkpoint's manifest besides its tensors."""
    origin = {"folder": source.name, "model_type": folder.config["model_type"], "optimizer": state is not None}
    if state is not None:
        told = {key: value for key, value in state.manifest.items() if key not in ("step", "config", "run")}
        return {**told, "config": asdict(config), "imported": origin}
    return {
        "weights_only": True,
        "optimizer_steps": 0,
        "tokens": 0,
        "cursor": None,
        "fingerprint": "",
        "layout": {"world_size": 1, "ep_size": 1, "zero_stage": 0},
        "random_states": [],
        "balancer": {},
        "alarms": {},
        "guard": {},
        "config": asdict(config),
        "imported": origin,
    }
