"""What training needs beside the weights, in a subfolder that `transformers`, vLLM and SGLang do not look into.

DIR/trimtab/state.json                       the checkpoint's manifest without its tensors; checksums of all files
DIR/trimtab/optimizer-00001.safetensors ...  both moments of every tensor, fp32, under our names
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import ConfigError
from launch.hf_weights import CHUNK
from parallel.checkpoint import CheckpointReader
from parallel.engine import Kind
from parallel.safetensors_file import Entry, SafetensorsReader, sha256, write_entries

FOLDER = "trimtab"
STATE = "state.json"
FORMAT = "trimtab-state-1"
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
_FILE = re.compile(r"^optimizer-\d{5}\.safetensors$")


def flat_chunks(reader: CheckpointReader, name: str, kind: Kind, start: int, stop: int) -> Iterator[Tensor]:
    """Elements [start, stop) of a checkpoint's logical tensor, `CHUNK` at a time, fp32."""
    for first in range(start, stop, CHUNK):
        yield reader.read(name, kind, first, min(stop, first + CHUNK))


def write_state(
    folder: Path,
    reader: CheckpointReader,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, str],
    file_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the subfolder.

    Args:
        folder: the Hugging Face folder.
        shapes: of our logical tensors.
        weights: sha256 of each of the folder's weight files: the moments belong to these weights and no others.
        file_bytes: a file is closed when it has so many.
        progress: told of the bytes written after each file.
    """
    target = folder / FOLDER
    target.mkdir()
    entries = []
    for name, shape in shapes.items():
        for kind in MOMENTS:
            chunks = partial(flat_chunks, reader, name, kind, 0, prod(shape))
            entries.append(Entry(f"{name}/{kind}", torch.float32, shape, chunks))
    files = {}
    for number, group in enumerate(grouped(entries, file_bytes), 1):
        file = f"optimizer-{number:05d}.safetensors"
        files[file] = write_entries(target / file, group)
        progress(sum(entry.n_bytes for entry in group))
    manifest = {key: value for key, value in reader.saved.manifest.items() if key not in ("files", "tensors", "format")}
    state = {"format": FORMAT, "step": reader.saved.step, "manifest": manifest, "files": files, "weights": weights}
    (target / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def grouped(entries: list[Entry], file_bytes: int) -> list[list[Entry]]:
    """Entries in their order, cut into files of at most `file_bytes` (one that is larger has a file to itself)."""
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if groups[-1] and held + entry.n_bytes > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.n_bytes
    return groups


@dataclass(frozen=True)
class SavedState:
    """What `write_state` left: the checkpoint's step and manifest (without tensors), and its moments."""

    step: int
    manifest: dict[str, Any]
    readers: dict[str, SafetensorsReader]
    file_of: dict[str, str]

    def chunks(self, name: str, kind: Kind, n: int) -> Iterator[Tensor]:
        """The n values of a moment in order."""
        key = f"{name}/{kind}"
        for first in range(0, n, CHUNK):
            yield self.readers[self.file_of[key]].flat_slice(key, first, min(n, first + CHUNK))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names what does not fit the model, as sentences."""
        wanted = {f"{name}/{kind}": shape for name, shape in shapes.items() for kind in MOMENTS}
        found = {key: tuple(self.readers[file].entries[key]["shape"]) for key, file in self.file_of.items()}
        odd = [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]
        if not odd:
            return []
        shown = ", ".join(sorted(odd)[:10]) + (", ..." if len(odd) > 10 else "")
        return [f"{FOLDER}/: {len(odd)} moments are missing, unknown or misshapen: {shown}; use --weights-only"]


def read_state(folder: Path) -> SavedState | None:
    """The optimizer's state in a Hugging Face folder; None where none was kept.

    Raises:
        ConfigError: a file is missing, damaged, or the weights are not those that the state belongs to.
    """
    path = folder / FOLDER / STATE
    if not path.is_file():
        return None
    way_out = "copy the folder again, or use --weights-only to leave the optimizer's state behind"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        step, manifest, files, weights = (state[key] for key in ("step", "manifest", "files", "weights"))
        known = state["format"] == FORMAT and all(_FILE.match(file) for file in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read: {error!r}; {way_out}"]) from error
    if not known:
        raise ConfigError([f"{path} is not of the format {FORMAT}; {way_out}"])
    problems = []
    listed = {folder / FOLDER / file: entry["sha256"] for file, entry in files.items()}
    listed |= {folder / Path(file).name: digest for file, digest in weights.items()}
    for file, digest in listed.items():
        if not file.is_file():
            problems.append(f"{file} is missing; {way_out}")
        elif sha256(file) != digest:
            problems.append(f"{file} is not the one that was exported with the optimizer's state; {way_out}")
    if problems:
        raise ConfigError(problems)
    readers = {file: SafetensorsReader(folder / FOLDER / file) for file in files}
    file_of = {key: file for file, reader in readers.items() for key in reader.entries}
    return SavedState(int(step), manifest, readers, file_of)
