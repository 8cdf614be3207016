"""Where sequences come from: the shards and documents whose tokens they hold, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.dataset import Dataset
from data.manifest import read_documents
from data.mixture import MixedDataset, MixedPlan
from data.plan import Plan


class Origin(NamedTuple):
    """One document in one sequence.

    sequence: id. source: name of the source, "" where there is one only. shard: its file's name. key: of the sample in
    the shard. name: of the document as it was packed; the key again where that is not at hand.
    """

    sequence: int
    source: str
    shard: str
    key: str
    name: str


def origins(
    dataset: Dataset | MixedDataset, plan: Plan | MixedPlan, sequences: Iterable[int], limit: int = 64
) -> tuple[list[Origin], int]:
    """The documents of sequences, and how many there are in all.

    Args:
        limit: so many are named at most. Their names are looked for in documents.jsonl, from its beginning.

    Raises:
        DataError: an index or documents.jsonl cannot be read.
    """
    wanted = np.array(sorted(set(sequences)), dtype=np.int64)
    found: list[Origin] = []
    total = 0
    datasets = dataset.datasets if isinstance(dataset, MixedDataset) else (dataset,)
    for number, (one, (source, own_plan, own)) in enumerate(zip(datasets, plan.parts(wanted), strict=True)):
        asked = wanted if len(datasets) == 1 else wanted[wanted % len(datasets) == number]
        table = own_plan.table(own) if len(own) else None
        if table is None:
            continue
        columns = (table.sequence.tolist(), table.shard.tolist(), table.row.tolist())
        pieces = list(dict.fromkeys(zip(*columns, strict=True)))
        total += len(pieces)
        kept = pieces[: max(0, limit - len(found))]
        keys = {(shard, row): one.train.key(shard, row) for _, shard, row in kept}
        names = _names(one, set(keys.values()))
        for place, shard, row in kept:
            key = keys[shard, row]
            file = one.manifest.train.shards[shard].file
            found.append(Origin(int(asked[place]), source, file, key, names.get(key, key)))
    return found, total


def _names(dataset: Dataset, keys: set[str]) -> dict[str, str]:
    """The names of training documents by key; none for data in a remote storage, whose list is not here."""
    if not isinstance(dataset.path, Path) or not keys:
        return {}
    names: dict[str, str] = {}
    for row in read_documents(dataset.path):
        if row["split"] == "train" and row["key"] in keys:
            names[row["key"]] = row["name"]
            if len(names) == len(keys):
                break
    return names
