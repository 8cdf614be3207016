"""Which shards and documents a sequence's tokens come from: by their names, as the stream reads them."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import Dataset, open_dataset
from data.mixture import MixedDataset, open_data, plan_of
from data.pack import pack
from data.plan import Plan
from data.provenance import origins
from data.stream import Stream


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of documents whose text is a letter of their own, repeated."""
    made = []
    for letters in ("abcdefghij", "klmnopqrst"):
        texts = tmp_path_factory.mktemp("texts")
        draw = random.Random(letters)
        for letter in letters:
            (texts / f"{letter}.txt").write_text(letter * draw.randint(40, 200))
        out = tmp_path_factory.mktemp("packed") / letters
        pack([str(texts)], out, tokenizer="bytes", heldout=0)
        made.append(out)
    return made


@pytest.fixture
def dataset(folders: list[Path]) -> Iterator[Dataset]:
    with open_dataset(folders[0]) as opened:
        yield opened


def letters_of(tokens: np.ndarray) -> set[str]:
    """The letters in a sequence's targets."""
    return {chr(token) for token in tokens.tolist() if token < 256}


def test_documents_are_those_whose_text_is_read(dataset: Dataset) -> None:
    plan = Plan(dataset.train, fingerprint=dataset.fingerprint, seed=3, seq_len=32, lanes=4)
    with Stream(dataset, plan, 0, 1, 4, 4) as stream:
        for step in range(6):
            (batch,) = stream.read(step)
            found, total = stream.origins(batch.sequence_ids.tolist())
            assert total == len(found)
            for row, sequence in enumerate(batch.sequence_ids.tolist()):
                names = {Path(origin.name).stem for origin in found if origin.sequence == sequence}
                read = letters_of(batch.targets[row][batch.loss_mask[row]].numpy())
                assert read and read <= names
            assert {origin.shard for origin in found} <= {shard.file for shard in dataset.manifest.train.shards}


def test_only_so_many_are_named(dataset: Dataset) -> None:
    plan = Plan(dataset.train, fingerprint=dataset.fingerprint, seed=3, seq_len=32, lanes=4)
    found, total = origins(dataset, plan, range(12), limit=5)
    assert len(found) == 5 < total
    assert origins(dataset, plan, []) == ([], 0)


def test_sources_of_a_mixture_are_named(folders: list[Path]) -> None:
    config = DataConfig(mixture=tuple(map(str, folders)), weights=(0.5, 0.5), seq_len=32, lanes=4)
    dataset = open_data(replace(config))
    assert isinstance(dataset, MixedDataset)
    with dataset:
        plan = plan_of(dataset, config, 4)
        with Stream(dataset, plan, 0, 1, 4, 4) as stream:
            seen: dict[str, str] = {}
            for step in range(5):
                (batch,) = stream.read(step)
                found, _ = stream.origins(batch.sequence_ids.tolist())
                for row, sequence in enumerate(batch.sequence_ids.tolist()):
                    of_one = [origin for origin in found if origin.sequence == sequence]
                    assert letters_of(batch.targets[row][batch.loss_mask[row]].numpy()) <= {
                        Path(origin.name).stem for origin in of_one
                    }
                    seen |= {origin.source: Path(origin.name).stem for origin in of_one}
        assert len(seen) == 2 and "" not in seen


def test_a_stream_that_leaves_data_out_forgets_what_it_read_ahead(dataset: Dataset) -> None:
    plan = Plan(dataset.train, fingerprint=dataset.fingerprint, seed=3, seq_len=32, lanes=4)
    with Stream(dataset, plan, 0, 1, 4, 4) as stream:
        later = plan.batch(4, 4)
        stream.read(0)  # reads steps 1 and 2 ahead
        stream.use(stream.batches.skipping(1, 3))
        (batch,) = stream.read(1)
        assert batch.sequence_ids.tolist() == later.tolist()
        assert stream.cursor(1)["skip_ranges"] == [[4, 16]]
