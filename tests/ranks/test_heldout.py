"""Held-out loss in the course of training: the run is bit for bit the same, the figure is that of one at the end."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.flag import StopFlag
from data.dataset import open_dataset
from data.manifest import PACK_RECORD, read_manifest
from launch.accounting import read_account
from launch.compare import compare, heldout
from launch.config import TrainConfig, dump
from launch.evaluate import evaluate
from launch.load import load_run
from launch.runfolder import RunFolder, committed_metrics, read_records
from launch.session import Session, assemble
from launch.summary import summarize_run
from launch.train import train
from parallel.config import ParallelConfig
from parallel.ranks import process_ranks
from tests.ranks.spawn import run_ranks
from tests.ranks.tiny import at_step, figures, play, saved_files, tiny
from tests.unit.data_samples import pack_small

EVERY_OTHER = TrainConfig(steps=5, global_batch_size=8, micro_batch_size=2, evaluate_every_steps=2)
LAYOUTS = [(1, 2), (3, 2)]  # ZeRO stage, expert-parallel size; 2 with 1 and 3 with 1 were tried by hand


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, several held out: more windows than one forward takes."""
    return pack_small(tmp_path_factory.mktemp("heldout"), heldout=0.1, heldout_kib=2)


def curve(folder: Path) -> dict[int, float]:
    """Step -> held-out loss, of the committed steps."""
    records = committed_metrics(RunFolder(folder))
    return {record["step"]: record["heldout_loss"] for record in records if "heldout_loss" in record}


def test_evaluation_changes_nothing_and_agrees_with_the_one_at_the_end(data: Path, tmp_path: Path) -> None:
    config = tiny(data, steps=5, train=EVERY_OTHER)
    play(replace(config, train=replace(EVERY_OTHER, evaluate_every_steps=0)), tmp_path / "without")
    play(config, tmp_path / "with")
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    assert saved_files(tmp_path / "with") == saved_files(tmp_path / "without") != {}
    assert list(curve(tmp_path / "with")) == [2, 4, 5] and not curve(tmp_path / "without")
    run = RunFolder(tmp_path / "with")
    last = list(committed_metrics(run))[-1]
    assert last["evaluation_seconds"] > 0 and last["step_seconds"] > 0
    run.config.write_text("")
    with open_dataset(data) as dataset:
        found = evaluate(load_run(run.path).model, dataset.heldout_documents(), dataset.manifest.eod_id, 32)
    assert last["heldout_loss"] == pytest.approx(found.loss, rel=1e-6)
    assert last["heldout_bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)


def test_a_resumed_run_has_the_same_curve_once(data: Path, tmp_path: Path) -> None:
    config = tiny(data, steps=5, train=EVERY_OTHER)
    play(config, tmp_path / "whole")

    def ends(session: Session) -> None:
        def raise_at_four(step: int) -> None:
            if step == 4:
                raise RuntimeError("a rank dies")

        at_step(session, raise_at_four)

    with pytest.raises(RuntimeError, match="a rank dies"):
        play(config, tmp_path / "broken", prepare=ends)
    play(config, tmp_path / "broken")
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    assert figures(tmp_path / "broken") == figures(tmp_path / "whole")


def test_a_stop_that_one_rank_hears_ends_the_evaluation_on_all(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.heldout.TOKENS_TOGETHER", 64)  # several forwards

    def hears(session: Session) -> None:
        measure = session.heldout.measure

        def measured(engine: Any, stop: StopFlag, mark: Any) -> Any:
            def marked() -> None:
                mark()
                if session.ranks.dp.rank == 1:
                    stop.set()

            return measure(engine, stop, marked)

        session.heldout.measure = measured  # type: ignore[method-assign]

    results = play(tiny(data, steps=5, train=EVERY_OTHER), tmp_path, prepare=hears)
    assert all(result["status"] == "stopped" and result["step"] == 2 for result in results)
    records = list(committed_metrics(RunFolder(tmp_path)))
    assert len(records) == 2 and "heldout_loss" not in records[-1] and records[-1]["evaluation_seconds"] > 0


def test_a_tokenizer_that_loses_bytes_has_no_bits_per_byte(data: Path, tmp_path: Path) -> None:
    lossy = tmp_path / "lossy"
    shutil.copytree(data, lossy)
    manifest = replace(read_manifest(data), lossless=False)
    (lossy / "manifest.json").write_text(manifest.to_json())
    (lossy / PACK_RECORD).unlink()  # it notes down the fingerprint of the other manifest
    run = RunFolder(tmp_path / "run")
    config = tiny(lossy, train=replace(EVERY_OTHER, steps=1))
    run.create(dump(config))
    play(config, run.path, 1)
    said: list[str] = []
    figures = summarize_run(run.path, said.append)
    [event] = [event for event in read_records(run.events_path) if event["kind"] == "evaluation"]
    text = "\n".join(said) + run.report.read_text() + compare([run.path])[0]
    last = list(committed_metrics(run))[-1]
    assert figures["heldout_loss"] == event["heldout_loss"] > 0 and "heldout_loss" in last
    assert event["bits_per_byte"] is event["gzip_bits_per_byte"] is event["xz_bits_per_byte"] is None
    assert "does not give back every byte" in event["bits_per_byte_absent"] and "no bits per byte, since" in text
    assert "gzip -9" not in text and "heldout_bits_per_byte" not in last
    assert "heldout_bits_per_byte" not in heldout(run.path)


def sharded(rank: int, world_size: int, payload: dict[str, Any]) -> list[Any]:
    """Under DeepSpeed: for each layout the figures without evaluation, with it, and the curve."""
    results = []
    for number, (stage, ep_size) in enumerate(LAYOUTS):
        for every in (0, 2):
            config = tiny(
                Path(payload["data"]), train=replace(EVERY_OTHER, evaluate_every_steps=every),
                parallel=ParallelConfig(ep_size=ep_size, zero_stage=stage),
            )  # fmt: skip
            run = RunFolder(Path(payload["folder"]) / f"{number}-{every}")
            if rank == 0:
                run.create("")
            ranks = process_ranks(ep_size, 120, 0)
            ranks.dp.barrier()
            session = assemble(config, run, ranks, torch.device("cpu"), StopFlag(), local_rank=rank)
            try:
                train(session, session.resume("auto", []))
            finally:
                session.close()
                getattr(session.engine, "close", lambda: None)()
            gc.freeze()
        results.append([stage, ep_size])
    return results


@pytest.mark.slow
def test_evaluation_changes_nothing_under_deepspeed(data: Path, tmp_path: Path) -> None:
    run_ranks(2, "tests.ranks.test_heldout:sharded", {"data": str(data), "folder": str(tmp_path)})
    curves = []
    for number in range(len(LAYOUTS)):
        assert figures(tmp_path / f"{number}-2") == figures(tmp_path / f"{number}-0")
        assert saved_files(tmp_path / f"{number}-2") == saved_files(tmp_path / f"{number}-0")
        curves.append(curve(tmp_path / f"{number}-2"))
    assert all(list(one) == [2, 4, 5] for one in curves)
    for one in curves[1:]:
        assert one == pytest.approx(curves[0], rel=1e-4)
    assert read_account(tmp_path / "0-2") is None  # no launcher ran
