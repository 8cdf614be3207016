"""The loader megatron-energon in `trimtab bench loader`: the same tar shards, with the index that it makes of them."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import open_dataset
from launch.bench_peers import Shape, Tensors, concatenate_and_split

_SHUFFLE_BUFFER = 1000
_SAMPLES_PER_SLICE = 100  # read one behind the other from a shard, as in its documentation's examples


class EnergonPeer:
    """megatron-energon, no worker processes: crude samples, shuffle buffer, its savable loader; concatenate and split.

    It cannot begin at a given document: what is timed as its resume is restoring the state behind the last timed pass.
    """

    name, package = "energon", "megatron-energon"
    note = f"shuffle buffer of {_SHUFFLE_BUFFER}; restores its saved state, taken behind the last timed pass"

    def __init__(self, path: Path, folder: Path, shape: Shape) -> None:
        from megatron.energon.flavors import BaseWebdatasetFactory

        self._folder, self._shape = folder / "energon", shape
        self._folder.mkdir()
        with open_dataset(path) as dataset:
            self._dtype = np.dtype(dataset.manifest.dtype)
            self._n_documents = dataset.manifest.train.n_documents
            files = [shard.file for shard in dataset.manifest.train.shards]
        for file in files:  # it writes its index beside the shards
            (self._folder / file).symlink_to(path / file)
        BaseWebdatasetFactory.prepare_dataset(
            self._folder, files, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (self._folder / ".nv-meta" / "dataset.yaml").write_text(kind, encoding="utf-8")
        self._state: Any = None

    def open(self) -> None:
        self._loader = self._make_loader()
        self._samples = iter(self._loader)

    def micro_batches(self) -> Iterator[Tensors]:
        yield from concatenate_and_split(self._documents(), self._shape)

    def resume(self, n_samples: int) -> None:
        self._loader = self._make_loader()
        self._loader.restore_state_rank(self._state)
        self._samples = iter(self._loader)
        next(self.micro_batches())
        del self._loader, self._samples

    def close(self) -> None:
        self._state = self._loader.save_state_rank()
        del self._loader, self._samples
        gc.collect()

    def _documents(self) -> Iterator[np.ndarray]:
        for sample in itertools.islice(self._samples, self._n_documents):
            yield np.frombuffer(sample.tokens, self._dtype)

    def _make_loader(self) -> Any:
        from megatron import energon

        dataset = energon.get_train_dataset(
            self._folder,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=_SHUFFLE_BUFFER,
            max_samples_per_sequence=_SAMPLES_PER_SLICE,
            task_encoder=_task_encoder(energon),
        )
        return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)


def _task_encoder(energon: Any) -> Any:
    """Hands the stored bytes on as they are."""
    from megatron.energon.task_encoder.base import stateless

    @energon.edataclass
    class Document(energon.Sample):  # type: ignore[misc, name-defined]
        tokens: bytes

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        return Document(**energon.basic_sample_keys(sample), tokens=sample["tok"])

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc, name-defined]
        decoder = None
        cookers = (energon.Cooker(cook),)

    return Encoder()
