"""A Hugging Face folder as it lies on the disk: its config.json, its index, its safetensors files; nothing is run.

What must not or cannot be read is refused here, by the name of the file, before a tensor is touched.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from launch.config import ConfigError
from parallel.safetensors_file import SafetensorsReader

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class HfFolder:
    """An opened folder.

    config: config.json. readers: by file name. file_of: for each tensor, the file that holds it.
    """

    path: Path
    config: Mapping[str, Any]
    readers: Mapping[str, SafetensorsReader]
    file_of: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file's header gives."""
        return tuple(self.readers[self.file_of[name]].entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        """The tensor's dtype; None for one that is not read here."""
        return self.readers[self.file_of[name]].dtype(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self.readers[self.file_of[name]].flat_slice(name, start, stop)


def open_folder(path: Path, ignore_auto_map: bool = False) -> HfFolder:
    """Reads config.json, the index and the headers of all files, and checks that every file is whole.

    Args:
        ignore_auto_map: read a folder that brings code of its own; the code is not run.

    Raises:
        ConfigError: with every problem found.
    """
    if not path.is_dir():
        raise ConfigError([f"{path} is not a folder; give a downloaded model's folder, with its config.json"])
    problems: list[str] = []
    notes: list[str] = []
    config = _json(path / "config.json", problems)
    _check_remote_code(path, config, ignore_auto_map, problems, notes)
    files, listed = _files(path, problems, notes)
    readers: dict[str, SafetensorsReader] = {}
    file_of: dict[str, str] = {}
    for file in files:
        reader = _opened(path / file, problems)
        if reader is None:
            continue
        readers[file] = reader
        for name in reader.entries:
            if name in file_of:
                problems.append(f"{path}: {name} is in {file_of[name]} and in {file}; keep one of them")
            file_of[name] = file
    if not problems:
        gone = [name for name, file in listed.items() if file_of.get(name) != file]
        problems += [f"{path / INDEX} says that {name} is in {listed[name]}, and it is not" for name in gone[:20]]
        problems += [f"... and {len(gone) - 20} more of {INDEX}"] if len(gone) > 20 else []
    if problems:
        raise ConfigError(problems)
    return HfFolder(path, config, readers, file_of, notes)


def _check_remote_code(
    path: Path, config: Mapping[str, Any], ignore: bool, problems: list[str], notes: list[str]
) -> None:
    asked = config.get("auto_map") or ({"trust_remote_code": True} if config.get("trust_remote_code") else None)
    if not asked:
        return
    wanted = ", ".join(f"{name} -> {value}" for name, value in asked.items()) if isinstance(asked, dict) else asked
    if ignore:
        notes.append(f"code of the folder is left alone: {wanted}")
        return
    problems.append(
        f"{path / 'config.json'} asks for code of its own to be run (auto_map: {wanted}); nothing of a folder is ever "
        "run here. If its model_type is what it says, --ignore-auto-map reads weights and configuration alone"
    )


def _files(path: Path, problems: list[str], notes: list[str]) -> tuple[list[str], dict[str, str]]:
    """The folder's weight files, and the index's word on which tensor is where (empty without an index)."""
    pickles = sorted(found.name for pattern in _PICKLES for found in path.glob(pattern))
    if (path / INDEX).is_file():
        before = len(problems)
        table = _json(path / INDEX, problems).get("weight_map")
        if len(problems) > before:
            return [], {}
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()) or not table:
            problems.append(f"{path / INDEX} has no weight_map from tensors to files; download it again")
            return [], {}
        files = sorted(set(table.values()))
        outside = [file for file in files if PurePath(file).name != file]
        pickled = [file for file in files if file not in outside and not file.endswith(".safetensors")]
        problems += [f"{path / INDEX} names {file!r}, which is not a file of this folder" for file in outside]
        problems += [_pickle(path / file) for file in pickled]
        return [file for file in files if file not in outside and file not in pickled], table
    if (path / SINGLE).is_file():
        return [SINGLE], {}
    if pickles:
        problems.append(_pickle(path / pickles[0], len(pickles)))
    else:
        problems.append(f"{path} holds neither {INDEX} nor {SINGLE}; download the weights in safetensors")
    return [], {}


def _pickle(file: Path, number: int = 1) -> str:
    more = f" (and {number - 1} more)" if number > 1 else ""
    return (
        f"{file}{more} is not safetensors but a pickle, which can run code when it is read, and is not opened here; "
        "download the safetensors of this model, or write them with transformers: save_pretrained(DIR)"
    )


def _opened(path: Path, problems: list[str]) -> SafetensorsReader | None:
    if not path.is_file():
        problems.append(f"{path} is missing, and {INDEX} names it; download it")
        return None
    try:
        reader = SafetensorsReader(path)
        stop, odd = 0, []
        for name, entry in reader.entries.items():
            first, last = entry["data_offsets"]
            stop = max(stop, last)
            dtype, n = reader.dtype(name), torch.Size(entry["shape"]).numel()
            if dtype is not None and (first < 0 or last - first != n * dtype.itemsize):
                odd.append(
                    f"{path}: {name} has {last - first} bytes, and {entry['shape']} {entry['dtype']} needs others"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path} cannot be read as safetensors: {error}; download it again")
        return None
    if stop > reader.n_bytes:
        problems.append(
            f"{path} is cut short: its header speaks of {stop:,} bytes of tensors and {reader.n_bytes:,} are there; "
            "download it again"
        )
        return None
    problems += odd
    return reader


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path} is missing; give the folder of a whole model")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}; download it again")
        return {}
    if not isinstance(table, dict):
        problems.append(f"{path} is not a JSON object; download it again")
        return {}
    return table
