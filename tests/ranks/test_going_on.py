"""Runs that go on with other settings, through the real train loop: batches, skips, the rate, the mix; the audit."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.audit import audit_run
from data.config import DataConfig
from data.errors import DataError
from data.pack import pack
from launch.config import CheckpointConfig, Config, dump
from launch.guard_config import GuardConfig
from launch.runfolder import RunFolder, committed_metrics
from launch.session import Session
from parallel.config import OptimizerConfig
from tests.ranks.tiny import events, play, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on a machine that others use: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sized(config: Config, size: int, steps: int, **sections: object) -> Config:
    config = replace(config, **sections)  # type: ignore[arg-type]
    return replace(config, train=replace(config.train, global_batch_size=size, steps=steps, micro_batch_size=2))


def go(config: Config, folder: Path, world_size: int = 2, prepare: object = None) -> None:
    RunFolder(folder).create(dump(config))
    play(config, folder, world_size, prepare)  # type: ignore[arg-type]


def test_another_batch_size_twice_with_skips_and_other_ranks_is_exact(contract_data: Path, tmp_path: Path) -> None:
    guard = GuardConfig(check_replicas_every_steps=0, max_skips=1, rollback_steps=2)
    config = tiny(contract_data, checkpoint=CheckpointConfig(every_steps=2, keep=0), guard=guard)

    def spoiled(session: Session) -> None:
        """The seventh step is not finite, once: the run goes back to a checkpoint older than the new size."""
        judge, done = session.guard.judge, []

        def judging(step: int, loss: float, norm: float):  # type: ignore[no-untyped-def]
            if step == 6 and not done:
                done.append(step)
                return judge(step, math.nan, norm)
            return judge(step, loss, norm)

        session.guard.judge = judging  # type: ignore[method-assign]

    go(sized(config, 8, 5), tmp_path, 2)
    go(sized(config, 16, 9), tmp_path, 1, spoiled)
    (back,) = events(tmp_path, "rollback")
    assert back["step"] == 4 and back["first_skipped"] == 7
    go(sized(config, 4, 12), tmp_path, 2)
    changes = [event["cause"] for event in events(tmp_path, "change")]
    assert [cause.split(":")[0] for cause in changes] == [
        "the global batch size goes from 8 to 16 at step 6", "the global batch size goes from 16 to 4 at step 10",
    ]  # fmt: skip
    report = audit_run(tmp_path)
    assert report.ok, str(report)
    assert report.n_skipped == 16 and report.n_sequences == 4 * 8 + 5 * 16 + 3 * 4
    assert [record["tokens"] for record in committed_metrics(RunFolder(tmp_path))][-1] > 0


def test_another_order_must_be_accepted_and_is_accepted_once(contract_data: Path, tmp_path: Path) -> None:
    config = tiny(contract_data, checkpoint=CheckpointConfig(every_steps=2, keep=0))
    go(sized(config, 8, 3), tmp_path, 1)
    other = replace(config, data=DataConfig(path=str(contract_data), seq_len=16))
    with pytest.raises(DataError, match=r"data\.seq_len was 32 and is 16.*--accept-change data\.seq_len"):
        go(sized(other, 8, 5), tmp_path, 1)

    def resumed(session: Session, mode: str, accepted: list[str], before: int | None = None) -> int:
        return original(session, mode, ["data.seq_len"], 1)

    original = Session.resume
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "resume", resumed)
        go(sized(other, 8, 5), tmp_path, 1)
        third = replace(config, data=DataConfig(path=str(contract_data), seq_len=16, seed=9))
        with pytest.raises(DataError, match=r"data\.seed was 0"):  # "--accept-change data" of the first start is spent
            patch.setattr(Session, "resume", lambda one, mode, accepted: original(one, mode, ["data"], 1))
            go(sized(third, 8, 7), tmp_path, 1)
    go(sized(other, 8, 6), tmp_path, 1)
    report = audit_run(tmp_path)
    assert report.ok and len(report.notes) == 2, str(report)
    (change,) = events(tmp_path, "change")
    assert "another order of the data" in change["cause"] and change["step"] == 3


def test_the_rate_jumps_only_where_settings_make_it(contract_data: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=0, schedule="wsd", decay_fraction=0.5)
    config = tiny(contract_data, optimizer=optimizer)
    go(sized(config, 8, 4), tmp_path, 1)
    go(sized(config, 8, 8), tmp_path, 1)
    (jump,) = events(tmp_path, "change")
    rates = [record["lr"] for record in committed_metrics(RunFolder(tmp_path))]
    assert (jump["old"], jump["new"]) == (rates[3], rates[4]) and jump["step"] == 4
    assert f"the rate goes from {rates[3]:.6g} to {rates[4]:.6g} at step 5" in jump["cause"]


def test_a_change_of_the_mix_is_no_spike(contract_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack([str(ROOT / "docs")], other, tokenizer="bytes", heldout_kib=1)
    mixture = DataConfig(
        mixture=(str(contract_data), str(other)), curriculum=((0, 1.0, 0.0), (12, 0.0, 1.0)), seq_len=32, path=""
    )
    guard = GuardConfig(check_replicas_every_steps=0, spike_window=16, drift_window=0)
    config = replace(tiny(contract_data, guard=guard), data=mixture, checkpoint=CheckpointConfig(every_steps=5, keep=0))

    def pretended(session: Session) -> None:
        judge = session.guard.judge
        session.guard.judge = lambda step, loss, norm: judge(step, 9.0 if step >= 12 else 2.0, norm)  # type: ignore[method-assign]

    run = tmp_path / "run"
    go(sized(config, 8, 11), run, 1, pretended)
    go(sized(config, 8, 16), run, 1, pretended)
    assert events(run, "skip") == []
    assert [event["step"] for event in events(run, "mix")] == [13]

    def worse(session: Session) -> None:
        pretended(session)
        judge = session.guard.judge
        session.guard.judge = lambda step, loss, norm: judge(step, loss, math.nan if step == 17 else norm)  # type: ignore[method-assign]

    go(sized(config, 8, 19), run, 1, worse)
    assert [event["step"] for event in events(run, "skip")] == [18], "what is not finite is skipped there as well"
    assert audit_run(run).ok
