"""The stream: contents against a naive reading, ranks together against one, resume, errors, waiting."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import cache as cache_module
from data.batches import Batches
from data.config import DataConfig
from data.cursor import batches_of
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.ledger import add_hashes, format_hash
from data.plan import Plan
from data.stream import MicroBatch, Stream, check_sizes
from tests.unit.data_samples import by_sequence, pack_small, plan_of, reference_sequence


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(pack_small(tmp_path_factory.mktemp("stream")))


def equal(first: list[MicroBatch], second: list[MicroBatch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("large_bytes", [1 << 20, 100])
def test_contents_equal_a_naive_reading(
    dataset: Dataset, packing: str, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LARGE_BYTES", large_bytes)  # 100: most documents are read by range
    plan = plan_of(dataset, packing=packing)
    n_steps = plan.n_sequences() // 6 + 3  # over the epoch's end
    with Stream(dataset, plan, 0, 1, 6, 3, cache_mb=1) as stream:
        for step in range(n_steps):
            micro_batches = stream.read(step)
            assert [len(micro.sequence_ids) for micro in micro_batches] == [3, 3]
            ids = [int(sequence) for micro in micro_batches for sequence in micro.sequence_ids]
            assert ids == plan.batch(step, 6).tolist()
            for micro in micro_batches:
                assert [str(tensor.dtype) for tensor in micro] == [
                    "torch.int64",
                    "torch.int64",
                    "torch.int64",
                    "torch.bool",
                    "torch.int64",
                    "torch.bool",
                ]
            for sequence, rows in by_sequence(micro_batches).items():
                assert dict(zip(MicroBatch._fields, rows, strict=False)) == reference_sequence(dataset, plan, sequence)


def test_split_has_no_padding_and_document_ids_rise_at_end_tokens(dataset: Dataset) -> None:
    with Stream(dataset, plan_of(dataset), 0, 1, 24, 24) as stream:
        (micro,) = stream.read(0)
    assert micro.loss_mask.all()
    assert torch.equal(micro.tokens[:, 1:], micro.targets[:, :-1])
    rises = torch.diff(micro.doc_ids, dim=1)
    assert torch.equal(rises.bool(), micro.tokens[:, 1:] == dataset.manifest.eod_id) and int(rises.max()) == 1
    assert not micro.doc_ids[:, 0].any()


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_one_epoch_is_the_corpus(dataset: Dataset, packing: str) -> None:
    """Counting targets over an epoch gives the counts of the stored tokens."""
    plan = plan_of(dataset, packing=packing, seq_len=16)
    epochs = 16 if packing == "split" else 1  # a whole number of sequences
    n_sequences = plan.epoch_start(epochs)
    seen = np.zeros(dataset.manifest.vocab_size, np.int64)
    with Stream(dataset, plan, 0, 1, 64, 64) as stream:
        for step in range(-(-n_sequences // 64)):
            (micro,) = stream.read(step)
            counted = micro.loss_mask & (torch.arange(64) + step * 64 < n_sequences)[:, None]
            seen += np.bincount(micro.targets[counted].numpy(), minlength=len(seen))
    stored = sum(
        np.bincount(dataset.train.read(shard, row), minlength=len(seen))
        for shard, info in enumerate(dataset.manifest.train.shards)
        for row in range(info.n_documents)
    )
    assert (seen == stored * epochs).all()


@pytest.mark.parametrize("dp_size", [2, 3, 4, 12])
def test_ranks_together_read_the_one_rank_batch(dataset: Dataset, dp_size: int) -> None:
    plan = plan_of(dataset)
    alone = Stream(dataset, plan, 0, 1, 24, 8)
    ranks = [Stream(dataset, plan_of(dataset), rank, dp_size, 24, 2) for rank in range(dp_size)]
    for step in (0, 1, 7):
        expected = by_sequence(alone.read(step))
        parts = [stream.read(step) for stream in ranks]
        assert {len(part) for part in parts} == {24 // dp_size // 2}
        assert by_sequence([micro for part in parts for micro in part]) == expected
        total = 0
        for stream in ranks:
            total = add_hashes(total, stream.consumed_hash(step))
        assert format_hash(total) == alone.ledger_hash(step) == ranks[-1].ledger_hash(step)
        as_tensor = torch.tensor([stream.consumed_hash(step) for stream in ranks], dtype=torch.int64)
        assert format_hash(int(as_tensor.sum())) == alone.ledger_hash(step)
    for stream in (alone, *ranks):
        stream.close()


def test_a_rank_keeps_to_its_lanes(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    with Stream(dataset, plan, 1, 4, 24, 6) as stream:
        own = [int(s) for step in range(3) for micro in stream.read(step) for s in micro.sequence_ids]
    expected = [int(s) for step in range(3) for s in plan.batch(step, 24)[1::4]]
    assert own == expected


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_resume_equals_going_on(dataset: Dataset, packing: str) -> None:
    with Stream(dataset, plan_of(dataset, packing=packing), 0, 2, 8, 4) as stream:
        expected = [stream.read(step) for step in range(9)]
        cursor = json.loads(json.dumps(stream.cursor(5)))
    with Stream(dataset, plan_of(dataset, packing=packing), 0, 2, 8, 4) as resumed:
        start = resumed.check_cursor(cursor)
        assert start == 5 and cursor["next_sequence"] == 40
        assert all(equal(resumed.read(step), expected[step]) for step in range(start, 9))
        assert equal(resumed.read(2), expected[2])  # a rollback
        assert equal(resumed.read(3), expected[3])


def test_a_cursor_of_other_data_or_settings_is_refused(dataset: Dataset) -> None:
    with Stream(dataset, plan_of(dataset), 0, 1, 8, 4) as stream:
        cursor = stream.cursor(3)
        for key, value, named in (
            ("fingerprint", "other", "data.path"),
            ("seed", 5, "data.seed was 5 and is 0"),
            ("seq_len", 9, "data.seq_len"),
            ("packing", "best_fit", "data.packing"),
            ("lanes", 48, "data.lanes"),
            ("window_shards", 9, "data.window_shards"),
            ("plan_version", 0, "version"),
        ):
            with pytest.raises(DataError, match=named):
                stream.check_cursor({**cursor, key: value})
        with pytest.raises(DataError, match="lacks seed"):
            stream.check_cursor({key: value for key, value in cursor.items() if key != "seed"})
    with (
        Stream(dataset, plan_of(dataset), 0, 1, 16, 4) as stream,
        pytest.raises(DataError, match=r"train\.global_batch_size"),
    ):
        stream.check_cursor(cursor)
    changed = batches_of(cursor).then(3, 16)
    with Stream(dataset, plan_of(dataset), 0, 1, changed, 4) as stream:
        assert stream.check_cursor(cursor) == 3
        assert [int(s) for micro in stream.read(3) for s in micro.sequence_ids] == plan_of(dataset).sequence_ids(
            np.arange(24, 40)
        ).tolist()


def test_skipped_ranges_are_left_out_and_saved(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    batches = Batches.constant(8).skipping(2)
    with Stream(dataset, plan, 0, 1, batches, 8) as stream:
        (micro,) = stream.read(2)
        assert micro.sequence_ids.tolist() == plan.batch(3, 8).tolist()
        assert batches_of(stream.cursor(4)) == batches
        assert stream.cursor(4)["next_sequence"] == 40


def test_ledger_lines(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    with Stream(dataset, plan, 0, 1, 8, 8) as stream:
        stream.read(4)
        line = stream.ledger_line(4, stream.consumed_hash(4))
        assert line == {
            "step": 5,
            "epoch": 0,
            "sequences": 8,
            "ranges": [[32, 40]],
            "hash": stream.ledger_hash(4),
            "plan": plan.digest(),
        }
        assert stream.ledger_hash(4) != stream.ledger_hash(5)
        with pytest.raises(DataError, match="step 5 was not the last one read"):
            stream.consumed_hash(5)
        assert stream.epoch(10**6) > 100


def test_prefetch_hides_slow_storage_and_waiting_is_measured(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(dataset)
    read, assembled = Stream._assemble_step, []

    def slow(self: Stream, step: int) -> list[MicroBatch]:
        time.sleep(0.1)
        assembled.append(step)
        return read(self, step)

    monkeypatch.setattr(Stream, "_assemble_step", slow)
    with Stream(dataset, plan, 0, 1, 4, 4) as stream:
        stream.read(0)
        first = stream.wait_seconds
        assert first >= 0.1
        deadline = time.monotonic() + 20
        while 2 not in assembled and time.monotonic() < deadline:
            time.sleep(0.01)
        assert assembled == [0, 1, 2]  # steps 1 and 2 were read ahead while nobody asked for it
        stream.read(1)
        assert stream.wait_seconds < first
        assert stream.total_wait_seconds == first + stream.wait_seconds
        stream.read(7)
        assert 7 in assembled


def test_waiting_has_an_end(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Stream, "_assemble_step", lambda self, step: release.wait(20) and [])
    with Stream(dataset, plan_of(dataset), 0, 1, 4, 4, timeout_s=0.1) as stream:
        with pytest.raises(DataError, match=r"rank 0 waited 0 s for the data of step 3"):
            stream.read(3)
        release.set()


def test_impossible_sizes_are_refused(dataset: Dataset) -> None:
    assert check_sizes(192, 4, 32, 4) == []
    problems = check_sizes(24, 5, 32, 4)
    assert len(problems) == 2 and "data.lanes = 24" in problems[0] and "multiple of 20" in problems[1]
    for rank, size, batch, micro, message in (
        (0, 5, 20, 4, "data.lanes"),
        (0, 2, 9, 1, "global_batch_size = 9"),
        (0, 2, 8, 3, "micro-batches of 3"),
        (2, 2, 8, 4, "rank 2 does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            Stream(dataset, plan_of(dataset), rank, size, batch, micro)


def test_a_plan_of_other_data_is_refused(dataset: Dataset) -> None:
    plan = Plan(dataset.train, fingerprint="other", seed=0, seq_len=8)
    with pytest.raises(DataError, match="is not of"):
        Stream(dataset, plan, 0, 1, 4, 4)


def test_config_problems_name_their_keys() -> None:
    assert DataConfig().problems() == []
    bad = DataConfig(path="", seq_len=0, seed=-1, lanes=0, window_shards=0, cache_mb=0, damage_budget=2.0)
    found = bad.problems()
    assert [problem.split(" ")[0] for problem in found] == [
        "data.path",
        "data.seq_len",
        "data.lanes",
        "data.window_shards",
        "data.cache_mb",
        "data.seed",
        "data.damage_budget",
    ]
    wrong = DataConfig(packing="x", mode="y", on_damage="z").problems()  # type: ignore[arg-type]
    assert len(wrong) == 3 and "best_fit" in wrong[0]
    assert "needs an index" in DataConfig(mode="stream", packing="best_fit").problems()[0]


def test_micro_batches_move_together(dataset: Dataset) -> None:
    with Stream(dataset, plan_of(dataset), 0, 1, 4, 4) as stream:
        moved = stream.read(0)[0].to("meta")
    assert {tensor.device.type for tensor in moved} == {"meta"}


def test_no_more_indexes_stay_mapped_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_small(tmp_path)
    train = open_dataset(folder).train
    expected = [train.records(shard).tolist() for shard in range(len(train.shard_tokens))]
    assert len(expected) > 3
    monkeypatch.setattr("data.dataset._MAPPED_INDEXES", 2)
    again = open_dataset(folder).train
    for _ in range(2):
        assert [again.records(shard).tolist() for shard in range(len(expected))] == expected
        assert len(again._records) <= 2
