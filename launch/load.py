"""Brings a run's newest checkpoint into one process, whatever the layout that wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import Dataset
from data.errors import DataError
from data.foreign import foreign_tokenizer
from data.mixture import MixedDataset, open_data
from data.tokenizer import Tokenizer, load_tokenizer
from launch.config import Config, ConfigError, from_tables, read
from launch.resume import checkpoint_root
from launch.run_tokenizer import begin_ids, kept_tokenizer, mismatch, same_ids
from launch.runfolder import RunFolder
from launch.session import bias_buffers
from model.exchange import LocalExchange
from model.naming import pieces
from model.slots import local_experts
from model.transformer import Transformer
from parallel.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Saved,
    damaged_files,
    open_checkpoint,
    step_of,
)
from parallel.roots import Root, readable


@dataclass(frozen=True)
class LoadedRun:
    """A run's model on one device, with what belongs to it.

    dataset: None where there is none to be had; `no_data` says why. tokenizer: the model's own. begin: the ids that
    stand before a prompt, none for some imported models.
    """

    config: Config
    saved: Saved
    model: Transformer
    dataset: Dataset | MixedDataset | None
    tokenizer: Tokenizer
    no_data: str
    begin: tuple[int, ...]


def committed_checkpoints(folder: Path) -> list[Root]:
    """The committed checkpoints of a run, oldest first, at least one.

    Raises:
        ConfigError: the folder is not a run, or has no checkpoint.
    """
    run = RunFolder(folder)
    if not run.is_run():
        raise ConfigError([f"{run.path} is not a run: it has no config.toml; give the folder of a run"])
    root = checkpoint_root(read(str(run.config), [], []), run)
    try:
        found = readable(root)
    except OSError as error:
        raise ConfigError([f"the checkpoints in {root} cannot be listed: {error}"]) from error
    if not found:
        raise ConfigError([f"{run.path} has no committed checkpoint in {root}; train it first"])
    return found


def checkpoint_at(folder: Path, step: int | None) -> Saved:
    """A run's checkpoint of one step, or the newest where step is None.

    Raises:
        ConfigError: the folder is not a run, or has no such checkpoint; those that it has are named.
    """
    paths = committed_checkpoints(folder)
    if step is None:
        return open_checkpoint(paths[-1])
    found = [path for path in paths if step_of(path) == step]
    if not found:
        there = ", ".join(str(step_of(path)) for path in paths)
        raise ConfigError([f"{folder} has no checkpoint of step {step}; there are {there}"])
    return open_checkpoint(found[-1])


def load_run(
    folder: Path, device: torch.device | None = None, step: int | None = None, tokenizer: Path | None = None
) -> LoadedRun:
    """Loads weights (the fp32 masters) and biases into one process.

    Args:
        folder: the run's folder.
        device: where the model goes; None is the CPU.
        step: which checkpoint; None is the newest.
        tokenizer: the model's tokenizer.json, for a run whose data is gone or has another; the data is left alone.

    Raises:
        ConfigError: no run, no such checkpoint, or data with another tokenizer than the model's.
        CheckpointError: a damaged file, named. DataError: no tokenizer is to be had.
    """
    saved = checkpoint_at(folder, step)
    wrong = damaged_files(saved)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    config = from_tables(saved.manifest["config"])
    own, dataset, no_data = _tokenizer_and_data(folder, config, tokenizer)
    model = Transformer(config.model, LocalExchange())
    reader = CheckpointReader(saved)
    experts = local_experts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
                values = reader.read(piece.logical_name, "weight", 0, piece.numel)
                flat[piece.start : piece.start + piece.numel] = values
        for name, bias in bias_buffers(config, model).items():
            bias.copy_(reader.read(name, "weight", 0, bias.numel()))
    model.eval()
    if device is not None:
        model.to(device)
    return LoadedRun(config, saved, model, dataset, own, no_data, begin_ids(kept_tokenizer(folder), own))


def _tokenizer_and_data(
    folder: Path, config: Config, given: Path | None
) -> tuple[Tokenizer, Dataset | MixedDataset | None, str]:
    """The model's tokenizer, its data, and why there is none; the two are checked against each other."""
    kept = kept_tokenizer(folder)
    if given is not None:
        tokenizer = load_tokenizer(given)
        if kept is not None and not same_ids(kept.tokenizer, tokenizer):
            raise ConfigError([f"--tokenizer {given} is not the model's own, {kept.path}; leave it out"])
        return kept.tokenizer if kept else tokenizer, None, f"--tokenizer {given} was given in place of the data"
    if config.data.mode != "indexed":
        tokenizer = kept.tokenizer if kept else foreign_tokenizer(config.data)
        return tokenizer, None, 'the run reads data.mode = "stream", which holds nothing out'
    try:
        dataset = open_data(config.data)
    except DataError as error:
        if kept is None:
            raise DataError(f"{error}. The run's tokenizer lies there") from error
        return kept.tokenizer, None, f"the run's data cannot be read: {error}"
    if kept is None:
        return dataset.tokenizer, dataset, ""
    try:
        wrong = mismatch(f"data.path = {config.data.path}", dataset.tokenizer, kept.path, kept.tokenizer)
    except DataError:
        dataset.close()
        raise
    if wrong is not None:
        dataset.close()
        raise ConfigError(
            [
                f"{wrong}; put the data back that the run was trained on. `trimtab generate` and `trimtab checkpoint "
                f"export` do without the data when they are given the model's own: --tokenizer {kept.path}"
            ]
        )
    return kept.tokenizer, dataset, ""
