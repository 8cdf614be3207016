"""The audit accepts exactly the histories in which every sequence was consumed once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audit import audit, audit_run
from data.batches import Batches
from data.errors import DataError
from data.ledger import add_hashes, hash_sequences, ledger_line
from data.plan import Plan
from tests.unit.data_samples import make_plan, pack_small

SHARDS = [[5, 9, 30, 4], [2, 2, 2, 7], [64, 10], [3] * 20]


def line(plan: Plan, step: int, batches: Batches, n_ranks: int = 1) -> str:
    """A ledger line as a run of `n_ranks` ranks writes it."""
    numbers = batches.numbers(step)
    ids = plan.sequence_ids(numbers)
    total = 0
    for rank in range(n_ranks):
        total = add_hashes(total, hash_sequences(ids[rank::n_ranks]))
    return json.dumps(
        ledger_line(step, plan.epoch_of(int(numbers[0])), numbers, total, plan.digest(), batches.skip_ranges)
    )


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8
    )
)
def test_any_history_of_restarts_is_proved(history: list[tuple[int, int, int]]) -> None:
    plan, batches = make_plan(SHARDS), Batches.constant(12)
    lines: list[str] = []
    step = 0
    for n_ranks, n_steps, lost in history:
        lines += [line(plan, now, batches, n_ranks) for now in range(step, step + n_steps)]
        step = max(0, step + n_steps - lost)
    report = audit(lines, plan)
    last = history[-1]
    n_steps = json.loads(lines[-1])["step"]
    assert report.ok, report.problems
    assert report.n_steps == n_steps and report.n_sequences == 12 * n_steps and last
    assert report.n_lines == len(lines) and report.n_replaced == len(lines) - n_steps
    assert sum(seen for _, seen, _ in report.epochs) == 12 * n_steps
    assert "exactly once" in str(report) and "NOT" not in str(report)


def test_ramps_and_skips_are_proved() -> None:
    plan = make_plan(SHARDS)
    batches = Batches.constant(4)
    lines = [line(plan, step, batches) for step in range(6)]
    batches = batches.skipping(3).then(5, 8)  # a bad batch: back to step 3 without it; later larger batches
    lines += [line(plan, step, batches) for step in range(3, 9)]
    report = audit(lines, plan)
    assert report.ok, report.problems
    assert (report.n_steps, report.n_replaced, report.n_skipped, report.n_sequences) == (9, 3, 4, 5 * 4 + 4 * 8)


def test_faults_are_found() -> None:
    plan, batches = make_plan(SHARDS), Batches.constant(6)
    good = [line(plan, step, batches) for step in range(8)]
    assert audit(good, plan).ok

    def problems(lines: list[str]) -> str:
        report = audit(lines, plan)
        assert not report.ok and "NOT exactly once" in str(report)
        return " | ".join(report.problems)

    def edited(step: int, **changes: object) -> list[str]:
        return [json.dumps({**json.loads(text), **changes}) if at == step else text for at, text in enumerate(good)]

    assert "step 4 is missing" in problems(good[:3] + good[4:])
    assert "step 1 is missing" in problems(good[2:])
    other = make_plan(SHARDS, seed=9)
    assert "followed the plan" in problems([*good[:4], line(other, 4, batches)])
    assert "other sequences" in problems(edited(2, hash="0" * 16))
    # a rank that read its sequences twice, another rank's lost
    ids = plan.batch(2, 6)
    doubled = add_hashes(hash_sequences(ids[0::2]), hash_sequences(ids[0::2]))
    assert "other sequences" in problems(edited(2, hash=f"{doubled % 2**64:016x}"))
    shifted = plan.sequence_ids(np.arange(11, 17))
    moved = problems(edited(2, ranges=[[11, 17]], hash=f"{hash_sequences(shifted) % 2**64:016x}"))
    assert "repeats the sequences 11 to 12" in moved and "consumed more than once" in moved and "were lost" in moved
    assert "6 sequences from 12 to 18 were lost" in problems(
        [*good[:2], line(plan, 2, Batches.constant(6).skipping(2)).replace(', "skip_ranges": [[12, 18]]', "")]
    )
    assert "says 7" in problems(edited(2, sequences=7))
    assert "not a ledger line" in problems(edited(2, ranges=[[5, 2]]))
    assert "not a ledger line" in problems(['{"step": 0}', *good])
    assert "no step" in problems([])
    assert "1 more problems" in str(audit([*['{"step": 0}'] * 21, *good], plan))


def test_half_written_lines_are_passed_over_if_their_step_came_again() -> None:
    plan, batches = make_plan(SHARDS), Batches.constant(6)
    good = [line(plan, step, batches) for step in range(5)]
    report = audit([*good[:3], good[3][:20], "", *good[3:]], plan)
    assert report.ok and report.n_torn == 1
    assert not audit([*good[:3], good[3][:20], *good[4:]], plan).ok


def test_a_runs_folder(tmp_path: Path) -> None:
    from data.config import DataConfig
    from data.dataset import open_dataset
    from data.stream import Stream

    path = pack_small(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(DataError, match="not a run"):
        audit_run(run)
    config = f'[data]\npath = "{path}"\nseq_len = 32\nlanes = 24\nnew_key = 1\n[train]\nsteps = 3\n'
    (run / "config.toml").write_text(config)
    lines = []
    with open_dataset(path) as dataset:
        plan = Plan.of(dataset, DataConfig(path=str(path), seq_len=32, lanes=24))
        with Stream(dataset, plan, 0, 1, 8, 4) as stream:
            for step in range(3):
                stream.read(step)
                lines.append(json.dumps(stream.ledger_line(step, stream.consumed_hash(step))))
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    assert audit_run(run).ok
    moved = path.rename(tmp_path / "moved")
    assert audit_run(run, moved).ok
    with pytest.raises(DataError, match="no such folder"):
        audit_run(run)
    (run / "config.toml").write_text(config.replace("seq_len = 32", "seq_len = 33"))
    assert not audit_run(run, moved).ok
    (run / "config.toml").write_text('[data]\nmode = "stream"\n')
    with pytest.raises(DataError, match="no plan"):
        audit_run(run, moved)
