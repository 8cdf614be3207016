"""The time of a resume on a large index: ten million documents whose lengths are known and whose texts do not exist."""

import gc
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.index import RECORD, map_records, read_header, write_index
from data.plan import Plan
from launch.bench_record import Spread

_STEPS = (10, 10_000, 1_000_000)
_SHARD_DOCUMENTS = 20_000  # what a shard of 64 MiB holds at a median of 400 tokens
_SEQ_LEN = 2048


class MappedIndex:
    """Document lengths from index files, as an opened dataset has them: each file is checked when it is first used."""

    def __init__(self, folder: Path, n_shards: int) -> None:
        self._paths = [folder / f"train-{number:05d}.idx" for number in range(n_shards)]
        self._headers = [read_header(path) for path in self._paths]
        self._records: dict[int, np.ndarray] = {}
        self.shard_documents = np.array([header.n_records for header in self._headers], np.int64)
        self.shard_tokens = np.load(folder / "tokens.npy", allow_pickle=False)

    def document_tokens(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, (n,) int64."""
        if shard not in self._records:
            self._records[shard] = map_records(self._paths[shard], self._headers[shard])
        return self._records[shard]["n_tokens"].astype(np.int64)


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


def resume_times(folder: Path, n_documents: int, batch: int, repeats: int = 3) -> dict[str, Any]:
    """Seconds from opened index files to the places of the first batch's documents, at several steps and both packings;
    medians of `repeats` resumes, each with files that are mapped and checked anew."""
    n_shards = write_synthetic_index(folder, n_documents)
    rows, lines = [], [f"resume on a synthetic index of {n_documents:,} documents in {n_shards} shards:"]
    for packing in ("split", "best_fit"):
        for step in _STEPS:
            seconds, private = [], 0.0
            for _ in range(repeats):
                gc.collect()
                before = private_mib()
                index = MappedIndex(folder, n_shards)
                started = time.perf_counter()
                plan = Plan(index, fingerprint="synthetic", seed=0, seq_len=_SEQ_LEN, packing=packing)
                plan.table(plan.batch(step, batch))
                seconds.append(time.perf_counter() - started)
                private = max(private, private_mib() - before)
                del plan, index
            spread = Spread.of(seconds)
            rows.append({"packing": packing, "step": step, "seconds": asdict(spread), "private_mib": round(private)})
            lines.append(
                f"  {packing:<9} step {step:>9,}: {spread.median:.3f} s ({spread.least:.3f} to {spread.greatest:.3f}), "
                f"{private:.0f} MiB of memory of its own"
            )
    return {"documents": n_documents, "shards": n_shards, "rows": rows, "lines": lines}


def private_mib() -> float:
    """Memory of this process that is not the page cache of mapped files; the peak of all of it where not on Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("RssAnon:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
