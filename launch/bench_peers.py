"""The loaders that `trimtab bench loader` runs: each gives micro-batches of the same shape from the same documents.

Every loader gives, per micro-batch, (tokens, targets): (B, S) int64 torch tensors. Ours and "mapped, same output" give
(B, S) document ids (int64) and a loss mask (bool) besides, which the others do not have. Their data is written once, in
their own format, before anything is timed.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.config import DataConfig
from data.dataset import Dataset, open_dataset
from data.plan import Plan
from data.stream import Stream


@dataclass(frozen=True)
class Shape:
    """B sequences of seq_len targets in a micro-batch, `batch` sequences in a step; packing of our stream."""

    seq_len: int
    batch: int
    micro_batch: int
    packing: str


Tensors = tuple[torch.Tensor, ...]


class Peer(Protocol):
    """A loader under test.

    name, package (its distribution, empty for none), note (what to know when reading its figures).
    """

    name: str
    package: str
    note: str

    def open(self) -> None:
        """Opens the data; not timed for throughput."""

    def micro_batches(self) -> Iterator[Tensors]:
        """One pass over the data, again at each call."""
        ...

    def resume(self, n_samples: int) -> None:
        """From nothing to the first micro-batch behind `n_samples` documents; timed as a whole."""

    def close(self) -> None:
        """Closes files."""


class OurStream:
    """Our stream: indexed shards, shuffled, packed, checked."""

    package = "google-crc32c"

    def __init__(self, path: Path, shape: Shape, *, cold: bool) -> None:
        self.name = "trimtab, first pass" if cold else "trimtab"
        self.note = "reads and checks every document, computes the windows" if cold else "later passes"
        self._path, self._shape, self._cold, self._epoch = path, shape, cold, 0
        self._config = DataConfig(seq_len=shape.seq_len, packing=shape.packing)  # type: ignore[arg-type]

    def open(self) -> None:
        self._epoch = 0
        self._dataset = open_dataset(self._path)
        self._plan = Plan.of(self._dataset, self._config)
        self._stream = self._open_stream(self._dataset, self._plan)

    def micro_batches(self) -> Iterator[Tensors]:
        if self._cold:
            self.close()
            self.open()
        steps = self._plan.epoch_steps(self._shape.batch).steps
        for step in range(self._epoch * steps, (self._epoch + 1) * steps):
            for micro in self._stream.read(step):
                yield micro[:4]
        self._epoch += 1

    def resume(self, n_samples: int) -> None:
        with open_dataset(self._path) as dataset:
            per_document = dataset.manifest.train.n_tokens / dataset.manifest.train.n_documents
            step = int(n_samples * per_document / self._shape.seq_len) // self._shape.batch
            with self._open_stream(dataset, Plan.of(dataset, self._config)) as stream:
                stream.read(step)

    def close(self) -> None:
        self._stream.close()
        self._dataset.close()

    def _open_stream(self, dataset: Dataset, plan: Plan) -> Stream:
        return Stream(dataset, plan, 0, 1, self._shape.batch, self._shape.micro_batch)


def concatenate_and_split(documents: Iterator[np.ndarray], shape: Shape) -> Iterator[Tensors]:
    """Micro-batches of documents (n,) one behind the other, cut every seq_len tokens."""
    n, wanted = shape.seq_len, shape.micro_batch * shape.seq_len + 1
    waiting: list[np.ndarray] = []
    total = 0
    for document in documents:
        waiting.append(document)
        total += len(document)
        while total >= wanted:
            joined = np.concatenate(waiting)
            inputs = joined[: wanted - 1].reshape(-1, n).astype(np.int64)
            targets = joined[1:wanted].reshape(-1, n).astype(np.int64)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
            waiting, total = [joined[wanted - 1 :]], total - wanted + 1


class WebDatasetPeer:
    """webdataset over the same tar shards: shuffle buffer, concatenate and split, batch."""

    name, package = "webdataset", "webdataset"
    note = "shuffle buffer of 1000; resumes by replay"

    def __init__(self, path: Path, shape: Shape) -> None:
        with open_dataset(path) as dataset:
            self._files = [str(path / shard.file) for shard in dataset.manifest.train.shards]
            self._dtype = np.dtype(dataset.manifest.dtype)
        self._shape = shape

    def open(self) -> None:
        import webdataset

        self._pipeline = webdataset.WebDataset(self._files, shardshuffle=100, seed=0).shuffle(1000, seed=0)

    def micro_batches(self) -> Iterator[Tensors]:
        return concatenate_and_split(self._documents(iter(self._pipeline)), self._shape)

    def resume(self, n_samples: int) -> None:
        self.open()
        samples = iter(self._pipeline.repeat())
        for _ in itertools.islice(samples, n_samples):
            pass
        next(concatenate_and_split(self._documents(samples), self._shape))

    def close(self) -> None:
        del self._pipeline

    def _documents(self, samples: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
        for sample in samples:
            yield np.frombuffer(sample["tok"], self._dtype)


MAPPED = {
    "mapped, same output": "one buffer; document ids from the end tokens, and a loss mask, as with us",
    "mapped, tokens": "tokens and targets only: one buffer, widened at once",
    "mapped, tokens, stacked": "tokens and targets only: a tensor a sequence, then torch.stack (nanoGPT's get_batch)",
}


class MappedPeer:
    """All tokens in one memory-mapped file, sequences in a shuffled order; documents stay in their stored order.

    `name` is one of MAPPED.
    """

    package = "numpy"

    def __init__(self, path: Path, folder: Path, shape: Shape, name: str) -> None:
        self.name, self.note = name, MAPPED[name]
        self._file, self._shape = folder / "tokens.bin", shape
        with open_dataset(path) as dataset:
            self._dtype, self._eod_id = np.dtype(dataset.manifest.dtype), dataset.manifest.eod_id
            if not self._file.exists():
                with self._file.open("wb") as file:
                    for shard, info in enumerate(dataset.manifest.train.shards):
                        for row in range(info.n_documents):
                            file.write(dataset.train.read(shard, row).tobytes())

    def open(self) -> None:
        self._tokens = np.memmap(self._file, self._dtype, "r")
        self._plain = np.asarray(self._tokens)  # slices of it are several times faster
        self._order = np.random.default_rng(0).permutation((len(self._tokens) - 1) // self._shape.seq_len)

    def micro_batches(self) -> Iterator[Tensors]:
        size = self._shape.micro_batch
        read = {"mapped, same output": self._read_all, "mapped, tokens": self._read_tokens}.get(self.name, self._stack)
        for start in range(0, len(self._order) - size + 1, size):
            yield read(self._order[start : start + size].tolist())

    def resume(self, n_samples: int) -> None:
        self.open()
        next(self.micro_batches())

    def close(self) -> None:
        del self._tokens, self._plain
        gc.collect()

    def _stack(self, ids: list[int]) -> Tensors:
        n = self._shape.seq_len
        inputs = [torch.from_numpy(self._tokens[i * n : (i + 1) * n].astype(np.int64)) for i in ids]
        targets = [torch.from_numpy(self._tokens[i * n + 1 : (i + 1) * n + 1].astype(np.int64)) for i in ids]
        return torch.stack(inputs), torch.stack(targets)

    def _read_rows(self, ids: list[int]) -> np.ndarray:
        n = self._shape.seq_len
        rows = np.empty((len(ids), n + 1), self._dtype)
        for row, i in enumerate(ids):
            rows[row] = self._plain[i * n : (i + 1) * n + 1]
        return rows

    def _read_tokens(self, ids: list[int]) -> Tensors:
        rows = self._read_rows(ids)
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    def _read_all(self, ids: list[int]) -> Tensors:
        rows = self._read_rows(ids)
        doc_ids = np.zeros((len(ids), self._shape.seq_len), np.int64)
        np.cumsum(rows[:, 1:-1] == self._eod_id, axis=1, out=doc_ids[:, 1:])
        mask = np.ones(doc_ids.shape, bool)
        tokens, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        return tuple(map(torch.from_numpy, (tokens, targets, doc_ids, mask)))


class StreamingPeer:
    """MosaicML streaming over MDS shards of ready-cut sequences (it does no packing)."""

    name, package = "streaming", "mosaicml-streaming"
    note = "sequences cut beforehand; shuffle py1e; resumes from its state"

    def __init__(self, path: Path, folder: Path, shape: Shape) -> None:
        from streaming import MDSWriter

        self._folder, self._shape = folder / f"mds-{shape.seq_len}", shape
        with open_dataset(path) as dataset:
            self._dtype = np.dtype(dataset.manifest.dtype)
            train = dataset.manifest.train
            self._per_document = train.n_tokens / train.n_documents
        tokens = np.memmap(folder / "tokens.bin", self._dtype, "r")
        with MDSWriter(out=str(self._folder), columns={"tokens": "bytes"}, size_limit=1 << 26, exist_ok=True) as out:
            for start in range(0, len(tokens) - shape.seq_len, shape.seq_len):
                out.write({"tokens": tokens[start : start + shape.seq_len + 1].tobytes()})

    def open(self) -> None:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        size = self._shape.micro_batch
        self._dataset = StreamingDataset(local=str(self._folder), batch_size=size, shuffle=True, shuffle_seed=0)

    def micro_batches(self) -> Iterator[Tensors]:
        samples = iter(self._dataset)
        while group := list(itertools.islice(samples, self._shape.micro_batch)):
            rows = np.stack([np.frombuffer(sample["tokens"], self._dtype) for sample in group])
            yield torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    def resume(self, n_samples: int) -> None:
        self.open()
        position = int(n_samples * self._per_document / self._shape.seq_len)
        n_epoch = len(self._dataset)
        state = {"epoch": position // n_epoch, "sample_in_epoch": position % n_epoch, "num_canonical_nodes": 1,
                 "shuffle_seed": 0, "initial_physical_nodes": 1}  # fmt: skip
        self._dataset.load_state_dict(state)
        next(self.micro_batches())
        self.close()

    def close(self) -> None:
        del self._dataset
        gc.collect()
