"""Any history of data-parallel sizes, crashes and rollbacks gives the global batches of an undisturbed run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audit import audit
from data.config import DataConfig
from data.dataset import Dataset, open_dataset
from data.ledger import add_hashes
from data.plan import Plan
from data.stream import Stream
from tests.unit.data_samples import pack_small

SIZES = (1, 2, 3, 4, 6, 8, 12, 24)
BATCH = 24
END = 14  # steps; an epoch of this dataset has about 11 of them

# one life of the run: ranks, steps until it ends, steps between checkpoints, what ends it, steps that a rollback undoes
LIFE = st.tuples(
    st.sampled_from(SIZES), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["crash", "stop", "rollback"]),
    st.integers(1, 6),
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with open_dataset(pack_small(tmp_path_factory.mktemp("history"))) as opened:
        yield opened


def open_ranks(dataset: Dataset, packing: str, size: int) -> list[Stream]:
    config = DataConfig(seq_len=64, lanes=24, window_shards=2, packing=packing)  # type: ignore[arg-type]
    plan = Plan.of(dataset, config)
    return [
        Stream(dataset, plan, rank, size, BATCH, 1 if size == 24 else BATCH // size // 2 or 1) for rank in range(size)
    ]


def one_step(ranks: list[Stream], step: int) -> tuple[dict[int, list], str]:
    """The global batch by sequence id, each with its contents, and the step's ledger line."""
    batch: dict[int, list] = {}
    total = 0
    for stream in ranks:
        for micro in stream.read(step):
            for row, sequence in enumerate(micro.sequence_ids.tolist()):
                assert sequence not in batch
                batch[sequence] = [tensor[row].tolist() for tensor in micro[:4]]
        total = add_hashes(total, stream.consumed_hash(step))
    return batch, json.dumps(ranks[0].ledger_line(step, total))


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset) -> dict[str, list[dict[int, list]]]:
    found = {}
    for packing in ("split", "best_fit"):
        (alone,) = open_ranks(dataset, packing, 1)
        found[packing] = [one_step([alone], step)[0] for step in range(END)]
        alone.close()
    return found


@settings(max_examples=25, deadline=None)
@given(lives=st.lists(LIFE, max_size=5), packing=st.sampled_from(["split", "best_fit"]), last=st.sampled_from(SIZES))
def test_any_history_gives_the_same_batches(
    dataset: Dataset, undisturbed: dict, lives: list[tuple[int, int, int, str, int]], packing: str, last: int
) -> None:
    lines: list[str] = []
    committed: dict[int, dict[int, list]] = {}
    saved: list[dict] = []  # cursors of checkpoints, as JSON would keep them
    for size, n_steps, every, ending, undone in [*lives, (last, END, 100, "end", 0)]:
        ranks = open_ranks(dataset, packing, size)
        step = {ranks_step for stream in ranks for ranks_step in [stream.check_cursor(saved[-1]) if saved else 0]}.pop()
        stop = min(END, step + n_steps)
        while step < stop:
            committed[step], line = one_step(ranks, step)
            lines.append(line)
            step += 1
            if step % every == 0:
                saved.append(json.loads(json.dumps(ranks[0].cursor(step))))
        if ending == "stop":
            saved.append(json.loads(json.dumps(ranks[0].cursor(step))))
        elif ending == "crash":
            lines.append('{"step": 3, "ranges": [[')  # what a dying process may leave
        elif ending == "rollback":
            saved = [cursor for cursor in saved if cursor["next_step"] <= max(0, step - undone)]
        for stream in ranks:
            stream.close()
    assert [committed[step] for step in range(END)] == undisturbed[packing]
    report = audit(lines, Plan.of(dataset, DataConfig(seq_len=64, lanes=24, window_shards=2, packing=packing)))
    assert report.ok and report.n_steps == END and report.n_sequences == END * BATCH, str(report)
    assert set(Counter(sequence for batch in committed.values() for sequence in batch).values()) == {1}
