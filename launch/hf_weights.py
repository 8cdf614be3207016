"""Which tensors of a Hugging Face folder make up each tensor of ours, checked as a whole, read in pieces."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from launch.hf_folder import HfFolder
from model.config import ModelConfig
from model.hf_fp8 import SCALE_SUFFIX, dequantise, scale_shape
from model.hf_names import HfTensor, fused_tensors, hf_tensors, logical_tensors

CHUNK = 1 << 23  # elements read at once: 32 MiB in fp32
_READ = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)  # e8m0: powers of two, "ue8m0"
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")  # old folders hold them; they follow from the configuration


@dataclass(frozen=True)
class Part:
    """Rows of one tensor of the folder: elements [start, start + rows * columns) of it.

    scale_start: where the scales of these rows begin in the tensor of scales; -1 for a weight without scales.
    """

    name: str
    start: int
    rows: int
    columns: int
    scale_start: int = -1


class HfWeights:
    """Reads our logical tensors out of an opened folder.

    Args:
        folder: from `open_folder`.
        config: the model that the folder is to hold.
        problems: every unknown, missing or misshapen tensor is appended.
    """

    def __init__(self, folder: HfFolder, config: ModelConfig, problems: list[str]) -> None:
        self.folder = folder
        self.block = _block(folder, problems)
        self._parts: dict[str, list[Part]] = {}
        self._copies: list[tuple[HfTensor, HfTensor]] = []
        self._missing: list[str] = []
        self._odd: list[str] = []
        self._known: set[str] = set()
        self._plan(config)
        unknown = [name for name in folder.file_of if name not in self._known and not _NOT_WEIGHTS.search(name)]
        for title, names in (("missing", self._missing), ("unknown", unknown)):
            if names:
                problems.append(f"{folder.path}: {len(names)} tensors are {title}: {', '.join(gathered(names))}")
        problems += [f"{folder.path}: {one}" for one in self._odd]

    def _plan(self, config: ModelConfig) -> None:
        by_name = {tensor.name: tensor for tensor in hf_tensors(config)}
        fused = {}  # our tensor -> where it lies in a stacked one
        for stack in fused_tensors(config):
            if stack.name not in self.folder.file_of:
                continue
            scaled = self._check(stack.name, stack.shape)
            rows, columns = stack.shape[1:]
            scales = prod(scale_shape((rows, columns), self.block)) if scaled and self.block else 0
            for expert, name in enumerate(stack.experts):
                start = scales * expert if scaled else -1
                fused[name] = Part(stack.name, expert * rows * columns, rows, columns, start)
        for logical in logical_tensors(config):
            if logical.name in fused:
                self._parts[logical.name] = [fused[logical.name]]
                twice = [part.name for part in logical.parts if part.name in self.folder.file_of]
                self._odd += [f"{name} is there alone and stacked; keep one of the two" for name in twice]
                self._known.update(twice)
                continue
            self._parts[logical.name] = [self._part(part) for part in logical.parts]
        for tensor in by_name.values():
            if tensor.name in self.folder.file_of and (tensor.copy_of or not tensor.source):
                self._check(tensor.name, tensor.shape)
                if tensor.copy_of in self.folder.file_of:
                    self._copies.append((tensor, by_name[tensor.copy_of]))

    def _part(self, tensor: HfTensor) -> Part:
        rows, columns = tensor.shape[0], prod(tensor.shape[1:])
        if tensor.name not in self.folder.file_of:
            self._missing.append(tensor.name)
            return Part(tensor.name, 0, rows, columns)
        return Part(tensor.name, 0, rows, columns, 0 if self._check(tensor.name, tensor.shape) else -1)

    def _check(self, name: str, shape: tuple[int, ...]) -> bool:
        """Notes what is wrong with a tensor that is there; returns whether it has scales."""
        self._known.add(name)
        dtype, found = self.folder.dtype(name), self.folder.shape(name)
        if found != shape:
            self._odd.append(f"{name} has shape {list(found)}, config.json makes it {list(shape)}")
        if dtype not in _READ:
            self._odd.append(f"{name} is {self._code(name)}; F32, BF16, F16 and block-scaled F8_E4M3 can be read")
        scale = name + SCALE_SUFFIX
        if dtype != torch.float8_e4m3fn:
            return False
        if scale not in self.folder.file_of:
            self._missing.append(scale)
            return False
        self._known.add(scale)
        if self.block is None or len(shape) < 2:
            self._odd.append(f"{name} is F8_E4M3, but config.json has no quantization_config with a weight_block_size")
            return False
        wanted = scale_shape(shape, self.block)
        if self.folder.shape(scale) != wanted:
            self._odd.append(f"{scale} has shape {list(self.folder.shape(scale))}, blocks make it {list(wanted)}")
        if self.folder.dtype(scale) not in _SCALES:
            self._odd.append(f"{scale} is {self._code(scale)}; scales can be read in F32, BF16, F16 and F8_E8M0")
        return True

    def _code(self, name: str) -> str:
        """The dtype as the file names it."""
        return str(self.folder.readers[self.folder.file_of[name]].entries[name]["dtype"])

    def differing_copies(self) -> Iterator[str]:
        """Says which repeated embedding or head is not the model's own; reads them all."""
        for copy, main in self._copies:
            pair = zip(self._chunks(self._part(copy)), self._chunks(self._part(main)), strict=True)
            if not all(torch.equal(one, other) for one, other in pair):
                yield (
                    f"{copy.name} differs from {main.name}; this model has one for both, and a prediction layer with "
                    "one of its own cannot be imported"
                )

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The values of our logical tensor in order, fp32, `CHUNK` elements or a row of blocks at a time."""
        for part in self._parts[name]:
            yield from self._chunks(part)

    def _chunks(self, part: Part) -> Iterator[Tensor]:
        step = max(1, CHUNK // max(1, part.columns))
        height = self.block[0] if self.block and part.scale_start >= 0 else 1
        step = -(-step // height) * height
        for first in range(0, part.rows, step):
            last = min(part.rows, first + step)
            start = part.start + first * part.columns
            values = self.folder.read(part.name, start, part.start + last * part.columns)
            if part.scale_start < 0 or self.block is None:
                yield values.float()
                continue
            across = -(-part.columns // self.block[1])
            top, bottom = first // height, -(-last // height)
            at = part.scale_start + top * across
            scales = self.folder.read(part.name + SCALE_SUFFIX, at, part.scale_start + bottom * across)
            yield dequantise(values.view(-1, part.columns), scales.view(-1, across), self.block).view(-1)


def _block(folder: HfFolder, problems: list[str]) -> tuple[int, int] | None:
    told = folder.config.get("quantization_config")
    if told is None:
        return None
    size = told.get("weight_block_size") if isinstance(told, dict) and told.get("quant_method") == "fp8" else None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    problems.append(
        f"{folder.path / 'config.json'}: quantization_config = {told!r} cannot be read; only quant_method fp8 with a "
        "weight_block_size of two numbers can. Take the weights before they were quantised"
    )
    return None


def gathered(names: Iterable[str]) -> list[str]:
    """Tensor names with runs of numbers drawn together: model.layers.{3-60}.mlp.gate.weight (58)."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name))
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(numbers)
    found = []
    for pattern, listed in groups.items():
        columns = [_range(sorted(set(column))) for column in zip(*listed, strict=True)]
        found.append(pattern.format(*columns) + (f" ({len(listed)})" if len(listed) > 1 else ""))
    return found


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    shown = [str(number) for number in numbers[:8]] + (["..."] if len(numbers) > 8 else [])
    return f"{{{','.join(shown)}}}"
