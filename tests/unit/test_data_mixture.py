"""Mixtures: sources by weights and a curriculum, each source's sequences in its own order, each exactly once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audit import audit, audit_run
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import DataError
from data.ledger import add_hashes, format_hash
from data.mixture import CYCLE, MixedDataset, MixedPlan, Phase, open_data, pattern, plan_of, slots
from data.pack import pack
from data.plan import Plan
from data.stream import Stream
from tests.unit.data_samples import SyntheticLengths, write_folder

WEIGHTS = st.lists(st.floats(0.001, 10), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(any))
def test_slots_are_whole_and_near_the_weights(weights: list[float]) -> None:
    found = slots(weights)
    assert sum(found) == CYCLE
    for weight, count in zip(weights, found, strict=True):
        assert (count > 0) == (weight > 0) and abs(count - weight / sum(weights) * CYCLE) <= len(weights)
    sources = pattern(found)
    assert np.bincount(sources, minlength=len(weights)).tolist() == found
    for source, count in enumerate(found):  # spread evenly: no long stretch without a source
        places = np.flatnonzero(sources == source)
        if count > 1:
            assert int(np.diff(places).max()) <= CYCLE / count + 2 * len(weights)


def mixed(weights: list[list[float]], firsts: list[int], seed: int = 0) -> MixedPlan:
    draw = np.random.default_rng(seed)
    plans = []
    for source in range(len(weights[0])):
        shards = [draw.integers(1, 40, draw.integers(1, 9)).tolist() for _ in range(3)]
        plans.append(
            Plan(SyntheticLengths(shards), fingerprint=f"f{source}", seed=1, seq_len=8, lanes=6, window_shards=2)
        )
    phases = [Phase(first, tuple(row)) for first, row in zip(firsts, weights, strict=True)]
    return MixedPlan(plans, phases, [f"s{source}" for source in range(len(plans))])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n_sources=st.integers(1, 4), n_phases=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_source_is_read_in_its_own_order_without_gap_or_repeat(
    data: st.DataObject, n_sources: int, n_phases: int, seed: int
) -> None:
    row = st.lists(st.floats(0.01, 1), min_size=n_sources, max_size=n_sources)
    weights = data.draw(st.lists(row, min_size=n_phases, max_size=n_phases))
    gaps = data.draw(st.lists(st.integers(1, 1500), min_size=n_phases - 1, max_size=n_phases - 1))
    plan = mixed(weights, np.cumsum([0, *gaps]).tolist(), seed)
    end = sum(gaps) + 1200
    located = [plan.locate(number) for number in range(end)]
    for source in range(n_sources):
        own = [number for which, number in located if which == source]
        assert own == list(range(len(own)))
        ids = plan.sequence_ids(np.arange(end))
        expected = plan.plans[source].sequence_ids(np.arange(len(own)))
        assert (ids[ids % n_sources == source] // n_sources).tolist() == expected.tolist()
    part = plan.sequence_ids(np.arange(500, 700))
    assert part.tolist() == plan.sequence_ids(np.arange(end))[500:700].tolist(), "a pure function of the number"
    for place, phase in enumerate(plan.phases):  # a whole cycle of each phase has exactly its shares
        stop = plan.phases[place + 1].first if place + 1 < n_phases else end
        if stop - phase.first >= CYCLE:
            seen = [which for which, _ in located[phase.first : phase.first + CYCLE]]
            assert np.bincount(seen, minlength=n_sources).tolist() == slots(phase.weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("mixture")
    for name, seed in (("a", 0), ("b", 5)):
        source = write_folder(root / f"source-{name}", n_documents=40, seed=seed)
        pack([str(source)], root / name, tokenizer="bytes", shard_mb=0.008)
    return [str(root / "a"), str(root / "b")]


def config_of(folders: list[str], **changes: object) -> DataConfig:
    given: dict = {"mixture": tuple(folders), "seq_len": 32, "lanes": 12, "window_shards": 2, **changes}
    return DataConfig(**given)


def test_streams_of_any_size_read_the_mixture_and_the_audit_understands_it(folders: list[str], tmp_path: Path) -> None:
    config = config_of(folders, curriculum=((0.0, 3.0, 1.0), (20.0, 1.0, 1.0)))
    assert config.problems() == []
    lines = []
    with open_data(config) as dataset:
        assert isinstance(dataset, MixedDataset)
        plan = plan_of(dataset, config, 12)
        sizes = [1, 2, 4, 12]
        streams = {size: [Stream(dataset, plan, rank, size, 12, 1) for rank in range(size)] for size in sizes}
        for step in range(60):
            seen = {}
            for size in sizes:
                rows = [micro for stream in streams[size] for micro in stream.read(step)]
                order = torch.cat([micro.sequence_ids for micro in rows]).argsort()
                seen[size] = [torch.cat([micro[place] for micro in rows])[order] for place in range(5)]
            assert all(torch.equal(a, b) for size in sizes for a, b in zip(seen[1], seen[size], strict=True))
            total = 0
            for stream in streams[4]:
                total = add_hashes(total, stream.consumed_hash(step))
            assert format_hash(total) == streams[1][0].ledger_hash(step)
            lines.append(json.dumps(streams[1][0].ledger_line(step, total)))
        cursor = json.loads(json.dumps(streams[2][0].cursor(30)))
        assert streams[4][0].check_cursor(cursor) == 30
        report = audit(lines, plan)
        assert report.ok and report.n_sequences == 720
        assert {str(epoch).split(" of ")[1] for epoch, _, _ in report.epochs} == set(folders)
        other = plan_of(dataset, config_of(folders, weights=(3.0, 1.0)), 12)
        assert not audit(lines, other).ok
        with Stream(dataset, other, 0, 1, 12, 1) as stream, pytest.raises(DataError, match=r"data\.weights"):
            stream.check_cursor(cursor)
        # a sequence's contents are those of its source alone
        with open_dataset(folders[1]) as alone:
            own = Stream(alone, Plan.of(alone, config), 0, 1, 12, 12)
            tokens = {int(i): row for i, row in zip(own.read(0)[0].sequence_ids, own.read(0)[0].tokens, strict=True)}
            own.close()
        matched = 0
        for step in range(8):
            for micro in streams[1][0].read(step):
                (sequence,) = micro.sequence_ids.tolist()
                if sequence % 2 == 1 and sequence // 2 in tokens:
                    assert torch.equal(tokens[sequence // 2], micro.tokens[0])
                    matched += 1
        assert matched == 12
        for group in streams.values():
            for stream in group:
                stream.close()
    run = tmp_path / "run"
    run.mkdir()
    paths = ", ".join(json.dumps(folder) for folder in folders)
    (run / "config.toml").write_text(
        f"[data]\nmixture = [{paths}]\nseq_len = 32\nlanes = 12\nwindow_shards = 2\n"
        "curriculum = [[0, 3.0, 1.0], [20, 1.0, 1.0]]\n[train]\nglobal_batch_size = 12\n"
    )
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    assert audit_run(run).ok


def test_other_tokenizers_and_impossible_settings_are_refused(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pack([folders[0].replace("/a", "/source-a")], tmp_path / "bpe", tokenizer="bpe:300")
    with pytest.raises(DataError, match="not the same"):
        open_data(config_of([folders[0], str(tmp_path / "bpe")]))
    two = tuple(folders)
    for changes, message in (
        ({"weights": (1.0,)}, "must be 2 weights"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"weights": (1.0, -1.0)}, "from 0 up"),
        ({"weights": (1.0, 1.0), "curriculum": ((0.0, 1.0, 1.0),)}, "exclude each other"),
        ({"curriculum": ((5.0, 1.0, 1.0),)}, "begin with 0"),
        ({"curriculum": ((0.0, 1.0, 1.0), (2.5, 1.0, 1.0))}, "whole"),
        ({"curriculum": ((0.0, 1.0),)}, "must be 2 weights"),
        ({"mixture": (two[0], two[0])}, "twice"),
        ({"mixture": (), "weights": (1.0,)}, "need data.mixture"),
        ({"mode": "stream"}, "needs an index"),
    ):
        found = config_of(folders, **changes).problems()
        assert any(message in problem for problem in found), (changes, found)
        assert all(problem.startswith("data.") for problem in found)
