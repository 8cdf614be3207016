"""Small corpora, synthetic lengths and a naive reading of the plan, shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.dataset import Dataset, open_dataset
from data.manifest import read_documents
from data.pack import pack
from data.plan import Plan
from data.stream import MicroBatch

WORDS = ["def", "return", "class", "import", "self", "data", "plan", "shard", "token", "é", "ü", "数", "\n\t", ""]


class SyntheticLengths:
    """Document lengths without a dataset: a list of arrays, one a shard."""

    def __init__(self, shards: list[list[int]]) -> None:
        self._shards = [np.array(shard, np.int64) for shard in shards]
        self.shard_tokens = np.array([shard.sum() for shard in self._shards], np.int64)
        self.shard_documents = np.array([len(shard) for shard in self._shards], np.int64)

    def document_tokens(self, shard: int) -> np.ndarray:
        return self._shards[shard]


def make_plan(shards: list[list[int]], **settings: object) -> Plan:
    """A plan over synthetic lengths."""
    given: dict = {"fingerprint": "synthetic", "seed": 1, "seq_len": 8, "lanes": 24, "window_shards": 2, **settings}
    return Plan(SyntheticLengths(shards), **given)


def write_folder(folder: Path, n_documents: int = 60, seed: int = 0, words: int = 120) -> Path:
    """A folder of small text files with seeded contents."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_documents):
        chosen = draw.integers(0, len(WORDS), int(draw.integers(1, words)))
        text = " ".join(WORDS[word] for word in chosen) + f" {number}\n"
        (folder / f"file{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def pack_small(root: Path, **options: object) -> Path:
    """Packs a small folder with the bytes tokenizer into several shards; returns the dataset's folder."""
    source = write_folder(root / "source")
    given: dict = {"tokenizer": "bytes", "shard_mb": 0.008, **options}
    pack([str(source)], root / "dataset", **given)
    return root / "dataset"


def stored_texts(path: Path) -> dict[str, bytes]:
    """Every document's text, decoded from the stored tokens, by name."""
    names = {row["key"]: row["name"] for row in read_documents(path)}
    found = {}
    with open_dataset(path) as dataset:
        for split in (dataset.train, dataset.heldout):
            for shard, info in enumerate(split.info.shards):
                for row in range(info.n_documents):
                    tokens = split.read(shard, row)
                    assert tokens[-1] == dataset.manifest.eod_id and dataset.manifest.eod_id not in tokens[:-1]
                    found[names[split.key(shard, row)]] = dataset.tokenizer.decode_bytes(tokens.tolist())
    return found


def reference_sequence(dataset: Dataset, plan: Plan, sequence: int) -> dict[str, list]:
    """One sequence laid out token by token from the plan's pieces and whole documents."""
    eod = dataset.manifest.eod_id
    rows: dict[str, list] = {"tokens": [], "targets": [], "doc_ids": [], "loss_mask": []}
    for number, piece in enumerate(plan.pieces(sequence)):
        document = [eod, *dataset.train.read(piece.shard, piece.row).tolist()]
        for target in range(piece.start, piece.stop):
            rows["tokens"].append(document[target])
            rows["targets"].append(document[target + 1])
            rows["doc_ids"].append(number)
            rows["loss_mask"].append(True)
    while len(rows["tokens"]) < plan.seq_len:
        rows["tokens"].append(eod)
        rows["targets"].append(eod)
        rows["doc_ids"].append(rows["doc_ids"][-1])
        rows["loss_mask"].append(False)
    return rows


def plan_of(dataset: Dataset, **settings: object) -> Plan:
    """The plan of a small dataset: short sequences, 24 lanes, windows of two shards."""
    given: dict = {"seq_len": 64, "lanes": 24, "window_shards": 2, **settings}
    return Plan.of(dataset, DataConfig(**given))


def by_sequence(micro_batches: list[MicroBatch]) -> dict[int, tuple]:
    """Rows of all tensors by sequence id."""
    return {
        int(micro.sequence_ids[row]): tuple(tensor[row].tolist() for tensor in micro[:4])
        for micro in micro_batches
        for row in range(len(micro.sequence_ids))
    }
