"""Checkpoints by logical name: saved in slices by every rank (parallel/saving.py), readable at any layout.

A checkpoint is a folder `step-00000100` with

    rank-00000.safetensors ...   each rank's share: weights (fp32 masters) and both moments, as flat runs
    manifest.json                every file with size and checksum, every tensor with shape and the runs that make it up
                                 (`weights_only` where there are no moments, of an imported model: they read as zeros)
    COMMIT                       the manifest's checksum; written last, and without it the folder is not a checkpoint

Everything is written under a temporary name, flushed, acknowledged by all ranks, then renamed; at an address, where
nothing can be renamed, it is written in place, COMMIT last (parallel/roots.py). No pickle anywhere.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.naming import pieces
from model.slots import local_experts
from parallel.communicator import Communicator
from parallel.engine import Engine, StateShard
from parallel.ownership import Identity, run_id
from parallel.roots import Root, committed, step_folder, step_of
from parallel.safetensors_file import SafetensorsReader, file_size, sha256

__all__ = ["committed", "step_folder", "step_of"]  # from parallel.roots; the rest is defined here

FORMAT = "trimtab-checkpoint-1"
Experts = Mapping[str, Sequence[int]]  # numbers of the experts stacked in a parameter: model.slots.local_experts
_FILE = re.compile(r"rank-\d{5}\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which file and why."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's manifest says, besides its tensors."""

    path: Root
    step: int
    manifest: dict[str, Any]


def open_checkpoint(path: Root) -> Saved:
    """Reads and checks a checkpoint's manifest; tensors are not touched.

    Raises:
        CheckpointError: not committed, manifest damaged, or of another format.
    """
    try:
        text = (path / "manifest.json").read_bytes()
        commit = (path / "COMMIT").read_text().strip()
    except OSError as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error}") from error
    if hashlib.sha256(text).hexdigest() != commit:
        raise CheckpointError(f"{path / 'manifest.json'} does not match COMMIT: it was changed after it was written")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    odd = [name for name in manifest["files"] if not _FILE.fullmatch(name)]
    if odd:
        raise CheckpointError(f"{path / 'manifest.json'} names files that no rank writes: {', '.join(map(repr, odd))}")
    return Saved(path, manifest["step"], manifest)


def open_together(path: Root, communicator: Communicator, identity: Identity | None = None) -> Saved:
    """`open_checkpoint`, collective.

    Args:
        identity: of the run that the checkpoint has to be of; only one rank needs to know it.

    Raises:
        CheckpointError: on every rank, when any rank cannot read it, or it is another run's.
    """
    wrong, saved = [], None
    try:
        saved = open_checkpoint(path)
    except CheckpointError as error:
        wrong = [f"rank {communicator.rank}: {error}"]
    if saved is not None and identity is not None and not identity.owns(run_id(saved.manifest)):
        told = saved.manifest["run"]
        wrong = [
            f"{path} is a checkpoint of another run: {told.get('folder')} (id {told['id']}), not of the {identity}"
        ]
    _refuse_together(wrong, communicator)
    assert saved is not None
    return saved


def damaged_files(saved: Saved, share: int = 0, shares: int = 1) -> list[str]:
    """Names the files whose size or checksum is not the manifest's, as sentences.

    share, shares: look at every `shares`-th file only, so that ranks can divide the work.
    """
    wrong = []
    for name, entry in sorted(saved.manifest["files"].items())[share::shares]:
        path = saved.path / name
        try:
            size = file_size(path)
            if size is None:
                wrong.append(f"{path} is missing")
            elif size != entry["size"]:
                wrong.append(f"{path} has {size} bytes, the manifest says {entry['size']}")
            elif sha256(path) != entry["sha256"]:
                wrong.append(f"{path} does not match its checksum: its bytes were changed")
        except OSError as error:
            wrong.append(f"{path} cannot be read: {error}")
    return wrong


class CheckpointReader:
    """Gives any run of any logical tensor of a checkpoint.

    Args:
        saved: from `open_checkpoint`.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self._files: dict[str, SafetensorsReader] = {}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened logical tensor, fp32.

        Raises:
            CheckpointError: the tensor, or a part of it, is not in the checkpoint.
        """
        entry = self.saved.manifest["tensors"].get(name)
        if entry is not None and kind != "weight" and self.saved.manifest.get("weights_only"):
            return torch.zeros(stop - start)  # an imported model: no optimizer has seen it yet
        if entry is None or kind not in entry["runs"]:
            raise CheckpointError(f"{self.saved.path} has no {kind} of {name}: it was saved from another model")
        runs = entry["runs"][kind]
        parts, position = [], start
        at = max(0, bisect_right([run[1] for run in runs], start) - 1)
        for file, first, numel in runs[at:]:
            if position >= stop or first > position:
                break
            last = min(stop, first + numel)
            if last > position:
                parts.append(self._slice(file, f"{name}/{kind}@{first}", position - first, last - first))
                position = last
        if position < stop:
            raise CheckpointError(f"{self.saved.path} lacks elements {position} to {stop} of {name} ({kind})")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _slice(self, file: str, key: str, start: int, stop: int) -> Tensor:
        if file not in self.saved.manifest["files"]:
            raise CheckpointError(f"{self.saved.path} says that {key} is in {file!r}, which is not among its files")
        try:
            if file not in self._files:  # its header is read once, not with every tensor
                self._files[file] = SafetensorsReader(self.saved.path / file)
            return self._files[file].flat_slice(key, start, stop)
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.saved.path / file} does not hold {key}: {error!r}") from error

    def shard(self, shard: StateShard, experts: Experts, before: Experts | None = None) -> Tensor:
        """The values of one local run, put together from the logical tensors that it covers.

        Args:
            experts: the numbers of the experts that the run is to hold.
            before: of those that it holds; logical tensors that are to stay where they are, are not read. None: the
                run holds nothing of worth.
        """
        stop = shard.start + shard.values.numel()
        wanted = pieces(shard.parameter, shard.shape, experts.get(shard.parameter, ()))
        held = wanted[:0] if before is None else pieces(shard.parameter, shard.shape, before.get(shard.parameter, ()))
        if held == wanted:
            return shard.values
        parts = []
        for number, piece in enumerate(wanted):
            first, last = max(shard.start, piece.start), min(stop, piece.start + piece.numel)
            if first >= last:
                continue
            if held and held[number] == piece:
                parts.append(shard.values[first - shard.start : last - shard.start].cpu())
            else:
                self._check_shape(piece.logical_name, tuple(piece.shape))
                parts.append(self.read(piece.logical_name, shard.kind, first - piece.start, last - piece.start))
        return torch.cat(parts)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.saved.manifest["tensors"].get(name)
        if entry is not None and tuple(entry["shape"]) != shape:
            raise CheckpointError(
                f"{self.saved.path}: {name} has shape {entry['shape']}, the model wants {list(shape)}; "
                "the configuration's [model] section is not the one that was saved"
            )


def load(saved: Saved, engine: Engine, biases: dict[str, Tensor], communicator: Communicator) -> dict[str, Any]:
    """Fills engine and biases from a checkpoint of any layout; collective over all ranks.

    Returns:
        The manifest (with the data cursor, random state and whatever else was stored).

    Raises:
        CheckpointError: on every rank when any rank found a damaged or missing file.
    """
    _refuse_together(damaged_files(saved, communicator.rank, communicator.size), communicator)
    reader, experts = CheckpointReader(saved), local_experts(engine.module)
    engine.load_state(lambda shard: reader.shard(shard, experts), int(saved.manifest["optimizer_steps"]))
    for name, bias in biases.items():
        bias.copy_(reader.read(name, "weight", 0, bias.numel()).view_as(bias))
    return saved.manifest


def load_moved(path: Root, engine: Engine, move: Callable[[], None], communicator: Communicator) -> None:
    """Moves experts between ranks by way of a checkpoint of the state that the engine now has; collective.

    Args:
        path: of the checkpoint, written from this engine, with not one step since.
        move: places the model's experts anew. It is called once every file is known to be whole; what then lies in
            another slot than before is read, weights and moments alike, and nothing else.

    Raises:
        CheckpointError: on every rank when any rank found a damaged or missing file; nothing was moved.
    """
    try:
        saved = open_checkpoint(path)
        wrong = damaged_files(saved, communicator.rank, communicator.size)
    except CheckpointError as error:
        wrong = [str(error)]
    _refuse_together(wrong, communicator)
    before = local_experts(engine.module)
    move()
    reader, experts = CheckpointReader(saved), local_experts(engine.module)
    engine.load_state(lambda shard: reader.shard(shard, experts, before), engine.optimizer_steps)


def _refuse_together(wrong: list[str], communicator: Communicator) -> None:
    everywhere = list(dict.fromkeys(line for lines in communicator.gather(wrong) for line in lines))
    if everywhere:
        raise CheckpointError("; ".join(everywhere))
