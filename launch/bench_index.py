"""The time of a resume on a large index: ten million documents whose lengths are known and whose texts do not exist."""

import gc
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.index import RECORD, map_records, read_header, write_index
from data.plan import Plan

_STEPS = (10, 10_000, 1_000_000)
_SHARD_DOCUMENTS = 20_000  # what a shard of 64 MiB holds at a median of 400 tokens
_SEQ_LEN = 2048


class MappedIndex:
    """Document lengths from index files, as an opened dataset has them."""

    def __init__(self, folder: Path, n_shards: int) -> None:
        self._paths = [folder / f"train-{number:05d}.idx" for number in range(n_shards)]
        self._headers = [read_header(path) for path in self._paths]
        self.shard_documents = np.array([header.n_records for header in self._headers], np.int64)
        self.shard_tokens = np.load(folder / "tokens.npy")

    def document_tokens(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, (n,) int64."""
        return map_records(self._paths[shard], self._headers[shard])["n_tokens"].astype(np.int64)


def write_synthetic_index(folder: Path, n_documents: int, seed: int = 0) -> int:
    """Writes index files of made-up documents (log-normal lengths); returns how many shards."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    totals = []
    for start in range(0, n_documents, _SHARD_DOCUMENTS):
        records = np.zeros(min(_SHARD_DOCUMENTS, n_documents - start), RECORD)
        records["n_tokens"] = np.maximum(1, draw.lognormal(6.0, 1.2, len(records)))
        totals.append(int(records["n_tokens"].sum()))
        write_index(folder / f"train-{len(totals) - 1:05d}.idx", records, 0, "00" * 32)
    np.save(folder / "tokens.npy", np.array(totals, np.int64))
    return len(totals)


def resume_times(folder: Path, n_documents: int, batch: int) -> dict[str, Any]:
    """Seconds from a mapped index to the places of the first batch's documents, at several steps and both packings."""
    n_shards = write_synthetic_index(folder, n_documents)
    rows, lines = [], [f"resume on a synthetic index of {n_documents:,} documents in {n_shards} shards:"]
    for packing in ("split", "best_fit"):
        for step in _STEPS:
            gc.collect()
            index = MappedIndex(folder, n_shards)
            started = time.perf_counter()
            plan = Plan(index, fingerprint="synthetic", seed=0, seq_len=_SEQ_LEN, packing=packing)
            for sequence in plan.batch(step, batch).tolist():
                plan.layout(sequence)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append({"packing": packing, "step": step, "seconds": round(seconds, 4), "peak_mib": round(peak)})
            lines.append(f"  {packing:<9} step {step:>9,}: {seconds:.3f} s (peak memory so far {peak:.0f} MiB)")
    return {"documents": n_documents, "shards": n_shards, "rows": rows, "lines": lines}
