"""The stream over damaged shards: stopped with a name, or masked and counted; the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import cache as cache_module
from data.assemble import Assembler
from data.dataset import Dataset, open_dataset
from data.errors import DamagedSampleError, DataError
from data.ledger import format_hash
from data.plan import Plan
from data.stream import Stream
from tests.unit.data_samples import by_sequence, pack_small, plan_of


def flip(path: Path, offset: int) -> Callable[[], None]:
    """Flips one byte of a file; returns what puts it back."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)

    def restore() -> None:
        content[offset] ^= 0xFF
        path.write_bytes(content)

    return restore


def damaged_place(dataset: Dataset, plan: Plan, step: int, size: int) -> tuple[Path, int, str, int]:
    """(shard file, byte of its last piece's payload, key, sequence) of a sequence of a step with several pieces."""
    sequence = next(int(s) for s in plan.batch(step, size) if len(plan.pieces(int(s))) > 1)
    piece = plan.pieces(sequence)[-1]
    offset = int(dataset.train.records(piece.shard)[piece.row]["offset"])
    path = dataset.path / dataset.manifest.train.shards[piece.shard].file
    return path, offset, dataset.train.key(piece.shard, piece.row), sequence


def test_a_step_larger_than_the_cache_is_whole(tmp_path: Path) -> None:
    """Documents that are forgotten and read again within one step, beside large ones."""
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset)
        ids = plan.batch(0, 24)
        small, ample = Assembler(dataset, plan, 1), Assembler(dataset, plan, 64)
        small._cache._capacity = 100
        for _ in range(2):
            for one, other in zip(small.read(ids), ample.read(ids), strict=True):
                assert np.array_equal(one, other)
        assert len(small._cache._kept) == 1 < len(ample._cache._kept)


@pytest.mark.parametrize("large_bytes", [1 << 20, 1])
def test_damage_stops_the_step_and_names_shard_key_and_offset(
    tmp_path: Path, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LARGE_BYTES", large_bytes)
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset)
        path, offset, key, _ = damaged_place(dataset, plan, 0, 12)
        flip(path, offset)
        with Stream(dataset, plan, 0, 1, 12, 12) as stream, pytest.raises(DamagedSampleError) as caught:
            stream.read(0)
        assert str(path) in str(caught.value) and f"sample {key} at byte {offset}" in str(caught.value)
        assert "checksum is wrong" in str(caught.value) and "trimtab data verify" in str(caught.value)


def test_a_shard_cut_while_training_stops_the_step(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset)
        path, offset, _, _ = damaged_place(dataset, plan, 0, 12)
        with path.open("r+b") as file:
            file.truncate(offset + 1)
        with Stream(dataset, plan, 0, 1, 12, 12) as stream, pytest.raises(DamagedSampleError, match="ends inside it"):
            stream.read(0)


def test_quarantine_masks_the_sequence_and_keeps_the_numbering(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset)
        path, offset, key, sequence = damaged_place(dataset, plan, 0, 12)
        with Stream(dataset, plan, 0, 1, 12, 12) as stream:
            whole = by_sequence(stream.read(0))
        flip(path, offset)
        with Stream(dataset, plan, 0, 1, 12, 12, on_damage="quarantine", damage_budget=1.0) as stream:
            masked = by_sequence(stream.read(0))
            assert list(masked) == list(whole)
            assert sequence in stream.quarantined and key in stream.quarantined[sequence]
            for each, rows in masked.items():
                if each in stream.quarantined:
                    assert not any(rows[3]) and set(rows[0]) == {dataset.manifest.eod_id} and not any(rows[2])
                else:
                    assert rows == whole[each]
            assert stream.ledger_hash(0) == format_hash(stream.consumed_hash(0))


def test_quarantine_stops_beyond_its_budget(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset, seq_len=8)
        for shard, info in enumerate(dataset.manifest.train.shards):
            flip(dataset.path / info.file, int(dataset.train.records(shard)[0]["offset"]))
        with (
            Stream(dataset, plan, 0, 1, 24, 24, on_damage="quarantine") as stream,
            pytest.raises(DataError, match=r"exceed data\.damage_budget"),
        ):
            for step in range(plan.epoch_steps(24).steps):
                stream.read(step)
                stream.check_damage(stream.n_quarantined)


def test_ranks_decide_about_damage_together_and_at_the_same_step(tmp_path: Path) -> None:
    """No rank alone exceeds the budget of one sequence; their sum does, and every rank hears it at the same step."""
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset, seq_len=8)
        for shard, info in enumerate(dataset.manifest.train.shards):
            flip(dataset.path / info.file, int(dataset.train.records(shard)[0]["offset"]))
        ranks = [Stream(dataset, plan, rank, 4, 24, 6, on_damage="quarantine") for rank in range(4)]
        outcomes: list[list[str]] = []
        for step in range(plan.epoch_steps(24).steps):
            assert all(len(stream.read(step)) == 1 for stream in ranks)  # damage stops no rank by itself
            total = sum(stream.n_quarantined for stream in ranks)
            found = []
            for stream in ranks:
                try:
                    assert stream.check_damage(total) == total
                    found.append("goes on")
                except DataError as error:
                    assert str(error).startswith(f"{total} damaged sequences exceed data.damage_budget")
                    found.append("stops")
            outcomes.append(found)
            assert len(set(found)) == 1
            assert (total > 1) == (found[0] == "stops")
            if total > 1:
                break
        assert outcomes[-1] == ["stops"] * 4
        saved = ranks[0].cursor(step)
        assert saved["quarantined"] == total
        for stream in ranks:
            stream.close()
        with Stream(dataset, plan, 0, 1, 24, 6, on_damage="quarantine", damage_budget=1.0) as resumed:
            resumed.check_cursor(saved)
            assert resumed.check_damage(0) == total  # the budget goes on where it was


def test_a_rollback_does_not_count_damage_twice(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset)
        path, offset, _, _ = damaged_place(dataset, plan, 0, 12)
        flip(path, offset)
        with Stream(dataset, plan, 0, 1, 12, 12, on_damage="quarantine", damage_budget=1.0) as stream:
            stream.read(0)
            once = stream.n_quarantined
            stream.read(1)
            twice = stream.n_quarantined
            stream.read(0)
            stream.read(1)
            assert 0 < once <= twice == stream.n_quarantined


def test_a_token_outside_the_vocabulary_masks_only_its_sequences(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        plan = plan_of(dataset, packing="best_fit")
        ids = plan.batch(0, 24)
        whole = Assembler(dataset, plan, 1).read(ids)
        dataset.train.vocab_size = int(max(row.max() for row in whole.tokens))  # the greatest ids are now outside
        damage: dict[int, str] = {}
        masked = Assembler(dataset, plan, 1).read(ids, damage)
        hit = np.array([int(sequence) in damage for sequence in ids])
        for sequence, row in zip(ids.tolist(), whole.targets, strict=True):
            if row.max() >= dataset.train.vocab_size:
                assert "outside the vocabulary" in damage[sequence]
        assert 0 < hit.sum() < len(ids)
        assert not masked.loss_mask[hit].any() and not masked.doc_ids[hit].any()
        for one, other in zip(whole, masked, strict=True):
            assert np.array_equal(one[~hit], other[~hit])


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with open_dataset(pack_small(tmp_path)) as dataset:
        dataset.train.vocab_size = 100
        with (
            Stream(dataset, plan_of(dataset), 0, 1, 4, 4) as stream,
            pytest.raises(DamagedSampleError, match="outside the vocabulary of 100"),
        ):
            stream.read(0)
