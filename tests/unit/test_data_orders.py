"""How a run goes on when its batch size or its data change: exactly where that can be, else each order by itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audit import audit_run
from data.batches import Batches
from data.config import DataConfig
from data.cursor import make_cursor
from data.dataset import Dataset
from data.ledger import add_hashes, hash_sequences, ledger_line
from data.mixture import MixedDataset, MixedPlan, open_data, plan_of
from data.orders import NAME, Order, go_on, record, recorded
from data.pack import pack
from tests.unit.data_samples import pack_small, write_folder


class Run:
    """A run's ledger and orders as training writes them, without the training."""

    def __init__(self, folder: Path, config: DataConfig, size: int) -> None:
        self.folder, self.step = folder, 0
        folder.mkdir(exist_ok=True)
        (folder / "ledger.jsonl").write_text("")
        (folder / NAME).write_text("")
        self.dataset: Dataset | MixedDataset | None = None
        self._open(config, size)
        self.plan, self.batches = plan_of(self._data(), config, size), Batches.constant(size)
        self._note(0, exact=True)

    def _data(self) -> Dataset | MixedDataset:
        assert self.dataset is not None
        return self.dataset

    def _open(self, config: DataConfig, size: int) -> None:
        if self.dataset is not None:
            self.dataset.close()
        self.config, self.size, self.dataset = config, size, open_data(config)

    def _note(self, step: int, exact: bool) -> None:
        with (self.folder / NAME).open("a") as file:
            file.write(json.dumps(record(self.plan, self.config, step, exact, self.size)) + "\n")

    def steps(self, count: int, n_ranks: int = 1) -> None:
        with (self.folder / "ledger.jsonl").open("a") as file:
            for _ in range(count):
                numbers = self.batches.numbers(self.step)
                assert len(numbers) == self.size
                ids, total = self.plan.sequence_ids(numbers), 0
                for rank in range(n_ranks):
                    total = add_hashes(total, hash_sequences(ids[rank::n_ranks]))
                told = ledger_line(self.step, 0, numbers, total, self.plan.digest(), self.batches.skip_ranges)
                file.write(json.dumps(told) + "\n")
                self.step += 1

    def cursor(self) -> dict:
        return json.loads(json.dumps(make_cursor(self.plan, self.batches, self.step)))

    def resume(self, config: DataConfig | None = None, size: int | None = None, cursor: dict | None = None) -> Order:
        cursor = cursor or self.cursor()
        self._open(config or self.config, size or self.size)
        order = go_on(self._data(), self.config, self.size, cursor)
        changed = order.plan.digest() != self.plan.digest()
        self.plan, self.batches, self.step = order.plan, order.batches, int(cursor["next_step"])
        if changed:
            self._note(self.step, order.exact if order.changed else True)
        return order

    def audit(self, data_path: str | None = None) -> tuple[bool, str]:
        tables = {key: value for key, value in asdict(self.config).items() if value not in ((), "", None)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
        (self.folder / "config.toml").write_text(
            "[data]\n" + "\n".join(lines) + f"\n[train]\nglobal_batch_size = {self.size}\n"
        )
        report = audit_run(self.folder, data_path)
        return report.ok, str(report)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets of one tokenizer."""
    base = tmp_path_factory.mktemp("orders")
    one = pack_small(base)
    pack([str(write_folder(base / "more", seed=5))], base / "other", tokenizer="bytes", shard_mb=0.008)
    return str(one), str(base / "other")


def settings_of(packed: tuple[str, str], **changes: object) -> DataConfig:
    return replace(DataConfig(path=packed[0], seq_len=16, lanes=24, window_shards=2, seed=1), **changes)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 12]), st.integers(1, 4), st.booleans(), st.sampled_from([1, 2, 4])),
        min_size=2, max_size=6,
    )
)  # fmt: skip
def test_any_sizes_after_each_other_with_skips_are_exact(
    history: list[tuple[int, int, bool, int]], packed: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = Run(tmp_path_factory.mktemp("run"), settings_of(packed), 12)
    run.steps(3)
    skipped = 0
    for size, count, skip, n_ranks in history:
        resized = size != run.size
        order = run.resume(size=size)
        assert order.changed == () and order.exact and (order.resized is not None) == resized
        run.steps(count, n_ranks)
        if skip:  # the guard went back before the last step and left its sequences out
            run.batches, run.step = run.batches.skipping(run.step - 1), run.step - 1
            skipped += size
            run.steps(2)
    ok, said = run.audit()
    assert ok, said
    assert f"{skipped:,} sequences skipped on purpose" in said


def test_a_restart_from_before_the_change_is_exact_too(packed: tuple[str, str], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", settings_of(packed), 4)
    run.steps(5)
    older = run.cursor()
    run.steps(2)
    run.resume(size=8)
    run.steps(2)
    assert run.resume(cursor=older).resized == (4, 8)  # the newest checkpoint was damaged
    run.steps(3)
    assert run.audit()[0], run.audit()[1]


def test_constant_batches_of_the_new_size_are_found_out(packed: tuple[str, str], tmp_path: Path) -> None:
    """What a change of the size did once: the step's number times the new size."""
    run = Run(tmp_path / "run", settings_of(packed), 2)
    run.steps(20)
    run.size, run.batches = 4, Batches.constant(4)
    run.steps(1)
    ok, said = run.audit()
    assert not ok and "step 21: 40 sequences from 40 to 80 were lost" in said


def test_a_moved_dataset_keeps_the_skipped_ranges(packed: tuple[str, str], tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(packed[0], moved)
    run = Run(tmp_path / "run", settings_of(packed), 4)
    run.steps(4)
    run.batches, run.step = run.batches.skipping(2, 2), 2
    run.steps(3)
    order = run.resume(settings_of(packed, path=str(moved)))
    assert order.changed == () and order.batches.skip_ranges == ((8, 16),)
    run.steps(3)
    ok, said = run.audit()
    assert ok and "8 sequences skipped on purpose" in said, said


@pytest.mark.parametrize("change", [{"seq_len": 24}, {"seed": 3}, {"packing": "best_fit"}, {"path": 1}])
def test_another_order_begins_at_its_first_sequence_and_each_is_proven(
    change: dict, packed: tuple[str, str], tmp_path: Path
) -> None:
    if "path" in change:
        change = {"path": packed[1]}
    run = Run(tmp_path / "run", settings_of(packed), 4)
    run.steps(5)
    order = run.resume(settings_of(packed, **change), size=8)
    assert not order.exact and len(order.changed) == 1
    assert order.batches.numbers(5).tolist() == list(range(8))
    run.steps(3)
    assert run.resume(size=2).changed == ()
    run.steps(4)
    ok, said = run.audit()
    assert ok, said
    assert "of steps 1 to 5 was checked by itself" in said and "began at its first sequence" in said
    ledger = (run.folder / "ledger.jsonl").read_text().splitlines()
    (run.folder / "ledger.jsonl").write_text("\n".join([*ledger[:2], *ledger[3:]]) + "\n")
    assert "step 3 is missing" in run.audit()[1]
    forged = json.dumps({**json.loads(ledger[3]), "hash": "0" * 16})
    (run.folder / "ledger.jsonl").write_text("\n".join([*ledger[:3], forged, *ledger[4:]]))
    assert "step 4: the ranks consumed other sequences" in run.audit()[1], "the order that is over is proven as well"
    (run.folder / "ledger.jsonl").write_text("\n".join(ledger))
    orders = (run.folder / NAME).read_text().splitlines()
    (run.folder / NAME).write_text("\n".join(orders[:1]))
    ok, said = run.audit()
    assert not ok and "no change was accepted" in said, "a step of another order that nobody accepted"


def test_an_order_whose_dataset_is_gone_is_not_called_proven(packed: tuple[str, str], tmp_path: Path) -> None:
    import shutil

    gone = tmp_path / "gone"
    shutil.copytree(packed[1], gone)
    run = Run(tmp_path / "run", settings_of(packed, path=str(gone)), 4)
    run.steps(5)
    run.resume(settings_of(packed))
    run.steps(3)
    shutil.rmtree(gone)
    ok, said = run.audit()
    assert not ok and "are not proven" in said and str(gone) in said
    assert run.resume(size=8).exact


def test_weights_change_where_they_are_and_every_source_goes_on(packed: tuple[str, str], tmp_path: Path) -> None:
    mixed = settings_of(packed, path="", mixture=packed, weights=(3.0, 1.0))
    run = Run(tmp_path / "run", mixed, 4)
    run.steps(6)
    assert isinstance(run.plan, MixedPlan)
    before = [run.plan.locate(number) for number in range(24)]
    order = run.resume(replace(mixed, weights=(1.0, 1.0)), size=8)
    assert order.exact and order.changed and isinstance(order.plan, MixedPlan)
    assert [order.plan.locate(number) for number in range(24)] == before
    run.steps(4)
    assert not run.resume().changed, "accepted once, it is the run's own order"
    run.steps(2)
    after = [order.plan.locate(number) for number in range(72)]
    for source in (0, 1):
        assert [own for at, own in after if at == source] == list(range(sum(at == source for at, _ in after)))
    shares = np.bincount([source for source, _ in after[24:]])
    assert abs(int(shares[0]) - int(shares[1])) <= 1
    ok, said = run.audit()
    assert ok and "checked by itself" not in said, said


def test_a_curriculum_keeps_its_steps_when_the_batch_grows(packed: tuple[str, str], tmp_path: Path) -> None:
    curriculum = ((0, 1.0, 0.0), (10, 0.0, 1.0))
    mixed = settings_of(packed, path="", mixture=packed, curriculum=curriculum)
    run = Run(tmp_path / "run", mixed, 2)
    run.steps(4)
    order = run.resume(size=6)
    assert order.exact and isinstance(order.plan, MixedPlan)
    assert [phase.first for phase in order.plan.phases] == [0, 4 * 2 + 6 * 6]
    run.steps(8)
    assert not run.resume().changed
    run.steps(1)
    ok, said = run.audit()
    assert ok, said


def test_records_survive_a_torn_line_and_an_edited_cursor_is_refused(packed: tuple[str, str], tmp_path: Path) -> None:
    from data.errors import DataError

    run = Run(tmp_path / "run", settings_of(packed), 4)
    run.steps(2)
    with (run.folder / NAME).open("a") as file:
        file.write('{"plan": "x"')
    assert len(recorded(run.folder / NAME)) == 1 and recorded(tmp_path / "none") == []
    with pytest.raises(DataError, match="was changed after it was written"):
        run.resume(cursor={**run.cursor(), "next_sequence": 7})
    with pytest.raises(DataError, match="lacks seed"):
        go_on(run._data(), run.config, 4, {key: value for key, value in run.cursor().items() if key != "seed"})
