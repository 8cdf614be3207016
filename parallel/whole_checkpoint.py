"""A checkpoint made by one process out of tensors that come in chunks; the whole model is never in memory.

Its files are called as ranks' files are, which readers take as they come: any layout loads it.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.checkpoint import CheckpointError, step_folder
from parallel.engine import Kind
from parallel.safetensors_file import Entry, write_entries
from parallel.saving import draft_folder, free_bytes, manifest, publish


class StateTensor(NamedTuple):
    """One logical tensor's weight or moment. chunks: its values in order, fp32."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def entry(self) -> Entry:
        """As the file holds it: one flat run, from element 0 on."""
        flat = (torch.Size(self.shape).numel(),)
        return Entry(f"{self.name}/{self.kind}@0", torch.float32, flat, self.chunks)


def write_whole(
    root: Path,
    step: int,
    tensors: Iterable[StateTensor],
    extra: Mapping[str, Any],
    file_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes and publishes a checkpoint.

    Args:
        root: the folder of checkpoints; made if it is not there.
        tensors: each weight, and each moment unless `extra` says `weights_only`.
        extra: as for `saving.save`. `weights_only: true` says that there are no moments, and means zeros.
        file_bytes: a file is closed when it has so many.
        progress: told of (bytes done, bytes in all) after each file.

    Returns:
        The published folder.

    Raises:
        CheckpointError: the disk has not the room. OSError: it could not be written.
    """
    groups: list[list[StateTensor]] = [[]]
    held = total = 0
    for tensor in tensors:
        size = tensor.entry.n_bytes
        if groups[-1] and held + size > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
        total += size
    if free_bytes(root) < total:
        raise CheckpointError(
            f"{root} has {free_bytes(root) / 2**30:,.1f} GiB free, and the checkpoint needs {total / 2**30:,.1f} GiB"
        )
    draft = draft_folder(root, step)
    draft.mkdir(parents=True)
    reports, done = [], 0
    for number, group in enumerate(groups):
        file = f"rank-{number:05d}.safetensors"
        entries = [tensor.entry for tensor in group]
        told = write_entries(draft / file, entries)
        runs = [
            [tensor.name, list(tensor.shape), tensor.kind, 0, entry.shape[0]]
            for tensor, entry in zip(group, entries, strict=True)
        ]
        reports.append({"file": file, "runs": runs, **told})
        done += sum(entry.n_bytes for entry in entries)
        if progress is not None:
            progress(done, total)
    final = root / step_folder(root, step).name
    publish(draft, final, manifest(step, reports, extra))
    return final
