"""Brings a run's newest checkpoint into one process, whatever the layout that wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import Dataset
from data.foreign import foreign_tokenizer
from data.mixture import MixedDataset, open_data
from data.tokenizer import Tokenizer
from launch.config import Config, ConfigError, from_tables, read
from launch.resume import checkpoint_root
from launch.runfolder import RunFolder
from launch.session import bias_buffers
from model.exchange import LocalExchange
from model.naming import pieces
from model.slots import local_experts
from model.transformer import Transformer
from parallel.checkpoint import CheckpointError, CheckpointReader, Saved, damaged_files, open_checkpoint
from parallel.roots import Root, readable


@dataclass(frozen=True)
class LoadedRun:
    """A run's model on one device, with what belongs to it; `dataset` is None for data.mode = "stream"."""

    config: Config
    saved: Saved
    model: Transformer
    dataset: Dataset | MixedDataset | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data that the run was trained on."""
        return self.dataset.tokenizer if self.dataset else foreign_tokenizer(self.config.data)


def newest_checkpoint(run: RunFolder) -> Saved:
    """The newest committed checkpoint of a run.

    Raises:
        ConfigError: the folder is not a run, or has no checkpoint.
    """
    return open_checkpoint(committed_checkpoints(run.path)[-1])


def committed_checkpoints(folder: Path) -> list[Root]:
    """The committed checkpoints of a run, oldest first, at least one; raises ConfigError like `newest_checkpoint`."""
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


def load_run(folder: Path, device: torch.device | None = None) -> LoadedRun:
    """Loads weights (the fp32 masters) and biases into one process.

    Args:
        folder: the run's folder.
        device: where the model goes; None is the CPU.

    Raises:
        ConfigError: no run, or no checkpoint. CheckpointError: a damaged file, named.
    """
    saved = newest_checkpoint(RunFolder(folder))
    wrong = damaged_files(saved)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    config = from_tables(saved.manifest["config"])
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
    dataset = open_data(config.data) if config.data.mode == "indexed" else None
    return LoadedRun(config, saved, model, dataset)
