"""The report: rendered from a run's files alone, right in its numbers, and there even when something is missing."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.findings import findings
from launch.history import MAX_DRAWN_STEPS, alarm_spells, read_history, summarize_history
from launch.plots import running_mean
from launch.report import lane_period, summarize, write_report
from launch.runfolder import RunFolder
from launch.step_record import StepRecord
from launch.telemetry import Telemetry

# matplotlib says so, and no more, where it could not lay a picture out.
pytestmark = pytest.mark.filterwarnings("error:constrained_layout not applied")

CONFIG_TOML = """
[model]
hidden_size = 64
num_hidden_layers = 3
first_k_dense_replace = 1
num_nextn_predict_layers = 0
n_routed_experts = 8
[parallel]
ep_size = 2
[balance]
rule = "sign"
"""
PICTURES = {
    "loss.png", "max_vio.png", "max_vio_layers.png", "loads.png", "bias.png", "ranks.png", "speed.png", "time.png",
    "memory.png",
}  # fmt: skip


def step_record(step: int, rng: np.random.Generator, **changes: Any) -> StepRecord:
    skew = np.exp(-step / 10) * np.linspace(-1, 1, 8)
    share = np.exp(skew) / np.exp(skew).sum()
    record = StepRecord(
        step=step, tokens=step * 512, loss=2 + 6 * math.exp(-step / 20), mtp_loss=3 + 5 * math.exp(-step / 20),
        grad_norm=1.0, lr=1e-3, step_seconds=0.5, tokens_per_second=1024.0, mfu=None, memory_gib=1.5,
        data_wait_seconds=0.05, all_to_all_seconds=0.1, waiting_seconds=0.02, bytes_sent=2**22, world_size=2, ep_size=2,
        tokens_per_expert=rng.multinomial(2048, share, size=2), expert_bias=np.float32(skew) * np.ones((2, 1)),
    )  # fmt: skip
    return replace(record, **changes)


def make_run(path: Path, steps: int, **changes: Any) -> Telemetry:
    run = RunFolder(path)
    run.create(CONFIG_TOML)
    telemetry = Telemetry.open(run, {}, total_steps=steps, main=True, console_mode="off")
    telemetry.event("start", cause="trimtab train debug", world_size=2)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        telemetry.log_step(step_record(step, rng, **changes))
    return telemetry


def test_the_report_shows_the_run(tmp_path: Path) -> None:
    telemetry = make_run(tmp_path / "debug", 40)
    telemetry.event("fault", cause="rank 1 died | signal 9", step=40, rank=1)
    telemetry.rewind(30, cause="resume from step 30")
    telemetry.log_step(step_record(31, np.random.default_rng(1)))
    telemetry.event("stop", cause="asked for", step=31)
    telemetry.close()
    report = write_report(tmp_path / "debug")
    assert report == tmp_path / "debug" / "report.md"
    text = report.read_text()
    assert text.startswith("# Run debug\n")
    assert "31 optimizer steps to step 31, 15,872 tokens" in text
    assert "| step time spent waiting for data | 10.0% |" in text
    assert "| step time spent in all-to-all | 20.0% |" in text
    assert "| `model.n_routed_experts` | 8 |" in text and "| `balance.rule` | sign |" in text
    assert "| fault | 40 | rank 1 died \\| signal 9 | rank 1 |" in text
    assert "| **yes** | faults, restarts, roll-backs or skipped steps |" in text
    assert "| **yes** | waiting for data |" in text
    assert "metrics_bytes" not in text
    shown = set(re.findall(r"!\[.*?\]\(plots/(.*?)\)", text))
    assert shown == PICTURES == {p.name for p in (tmp_path / "debug" / "plots").iterdir()}
    for picture in (tmp_path / "debug" / "plots").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_the_report_needs_only_the_files(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 12, tokens_per_expert=np.zeros((0, 0), dtype=np.int64), expert_bias=None).close()
    first = write_report(tmp_path / "run").read_text()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert write_report(tmp_path / "moved").read_text() == first.replace("# Run run\n", "# Run moved\n")


def test_the_summary_is_the_literal_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 40).close()
    summary = summarize(tmp_path / "run")
    losses = [2 + 6 * math.exp(-step / 20) for step in range(1, 41)]
    assert summary["steps"] == summary["last_step"] == 40 and summary["window_steps"] == 4
    assert summary["tokens"] == 40 * 512 and summary["train_seconds"] == pytest.approx(20.0)
    assert summary["loss_first"] == pytest.approx(losses[0])
    assert summary["loss_last"] == pytest.approx(sum(losses[-4:]) / 4)
    assert summary["tokens_per_second"] == 1024.0
    assert summary["data_wait_share"] == pytest.approx(0.1) and summary["all_to_all_share"] == pytest.approx(0.2)
    assert summary["max_vio_first"] > 4 * summary["max_vio_last"]
    assert summary["max_vio_floor"] == pytest.approx(math.sqrt(2 * math.log(8) * 8 / 2048), rel=1e-4)
    assert summary["mfu"] is None


@pytest.mark.parametrize("steps", [1, 2])
def test_a_very_short_run_has_a_report(tmp_path: Path, steps: int) -> None:
    make_run(tmp_path / "run", steps).close()
    assert f"{steps} optimizer steps" in write_report(tmp_path / "run").read_text()


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create(CONFIG_TOML)
    text = write_report(tmp_path / "run").read_text()
    assert "No step has been recorded yet." in text and "None were recorded." in text
    assert summarize(tmp_path / "run") == {"steps": 0, "last_step": 0}


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.toml, so it is not a run"):
        write_report(tmp_path)


def test_a_dense_run_has_no_balance_pictures(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5, tokens_per_expert=np.zeros((0, 0), dtype=np.int64), expert_bias=None, mtp_loss=None)
    text = write_report(tmp_path / "run").read_text()
    assert "plots/loss.png" in text and "max_vio.png" not in text and "loads.png" not in text


def test_a_run_of_one_rank_has_no_picture_of_the_ranks(tmp_path: Path) -> None:
    alone = {"world_size": 1, "ep_size": 1, "waiting_seconds": 0.0, "bytes_sent": 0}
    make_run(tmp_path / "run", 5, **alone).close()
    assert "ranks.png" not in write_report(tmp_path / "run").read_text()
    assert not (tmp_path / "run" / "plots" / "ranks.png").exists()


def test_a_run_whose_loss_was_lost_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5, loss=math.nan, grad_norm=math.nan)
    text = write_report(tmp_path / "run").read_text()
    assert "| **yes** | the loss does not fall or is not a number |" in text and "nan" not in text


def test_without_matplotlib_the_report_is_text_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make_run(tmp_path / "run", 5).close()
    text = write_report(tmp_path / "run").read_text()
    assert "There are no pictures: matplotlib is not installed" in text and "![" not in text
    assert "## What to look at" in text and not (tmp_path / "run" / "plots").exists()


def test_long_runs_are_thinned_evenly(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(CONFIG_TOML)
    for step in range(1, 1501):
        run.metrics.append({"step": step, "loss": 1.0, "tokens_per_expert": [[step, 1]], "expert_bias": [[0.5, 0.25]]})
    history = read_history(run)
    assert len(history.steps) == 1500
    assert MAX_DRAWN_STEPS // 2 <= len(history.drawn_steps) <= MAX_DRAWN_STEPS
    assert len(set(np.diff(history.drawn_steps))) == 1
    assert history.loads[:, 0, 0].tolist() == history.drawn_steps.tolist()


def test_the_running_mean_leaves_out_what_is_not_a_number() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0])
    assert running_mean(values, 3).tolist() == [1.0, 2.0, 4.0, 4.0]
    assert running_mean(values, 1).tolist()[0] == 1.0 and math.isnan(running_mean(values, 1)[1])


def test_no_spike_is_thinned_away(tmp_path: Path) -> None:
    """Spikes at every 24th step, all of them even, as a lane's document makes them: each is drawn, and said."""
    run = RunFolder(tmp_path / "run")
    run.create(CONFIG_TOML + "[data]\nlanes = 192\n[train]\nglobal_batch_size = 8\n")
    spikes = list(range(20, 2001, 24))
    for step in range(1, 2001):
        loads = [[30, 10]] if step in spikes else [[21, 19]]
        run.metrics.append({"step": step, "loss": 1.0, "max_vio": loads[0][0] / 20 - 1, "max_vio_per_layer": [0.05],
                            "tokens_per_expert": loads, "expert_bias": [[0.5, 0.25]]})  # fmt: skip
    history = read_history(run)
    assert history.drawn_from == 8 and len(history.drawn_steps) <= MAX_DRAWN_STEPS
    drawn = history.drawn_steps[(history.loads[:, 0, 0] == 30)].tolist()
    assert drawn == spikes
    assert len(history.layer_steps) == 2000 and history.layers_from == 1
    assert history.recent_loads[:, 0, 0].tolist() == [30 if step in spikes else 21 for step in range(1981, 2001)]
    pairs, spells = None, alarm_spells([])
    for period, reason in ((24, True), (25, False)):
        text = " ".join(findings(history, spells, pairs, summarize_history(history), ["layer 1"], period))
        assert "max_vio rises to 0.50 every 24 steps, over a median of 0.05" in text
        assert ("`data.lanes`" in text) == reason
    assert lane_period({"data": {"lanes": 192}, "train": {"global_batch_size": 8}}) == 24
    assert lane_period({"data": {"lanes": 192}, "train": {"global_batch_size": 9}}) is None


def test_troubles_are_counted_by_their_kinds(tmp_path: Path) -> None:
    telemetry = make_run(tmp_path / "run", 5)
    telemetry.event("restart", cause="rank 1 was killed", step=3)
    telemetry.event("skip", cause="a spike", step=4)
    telemetry.event("skip", cause="a spike", step=5)
    telemetry.close()
    text = write_report(tmp_path / "run").read_text()
    assert "This run has 1 restart, 2 skipped steps. Their causes" in text


def test_what_ran_and_what_it_reached_stand_on_top(tmp_path: Path) -> None:
    telemetry = make_run(tmp_path / "run", 5)
    facts = {
        "parameters": 4931712, "active_parameters": 1982592, "world_size": 2, "ep_size": 2, "zero_stage": 1,
        "device": "cpu", "launcher": "ray", "threads_per_rank": 1, "commit": None,
        "hardware": {"processor": "A | B", "cores": 2}, "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    telemetry.run.event("start", cause="trimtab train debug", versions={"torch": "2.12.0"}, **facts)
    telemetry.run.event("start", cause="trimtab train debug", versions={"torch": "2.13.0"}, **facts)
    figures = {"heldout_loss": 2.5, "bits_per_byte": 1.25, "gzip_bits_per_byte": 2.0, "xz_bits_per_byte": None}
    telemetry.run.event("evaluation", cause="end of training", step=5, **figures)
    telemetry.close()
    text = write_report(tmp_path / "run").read_text()
    top = text[: text.index("| figure | value |")]
    assert "held-out loss 2.5000, **1.2500 bits per byte** (gzip -9 2.0000 on the same bytes)." in top
    assert "| parameters | 4,931,712, 1,982,592 of them active for a token |" in top
    assert "| ranks | 2 in expert-parallel groups of 2, ZeRO stage 1, on cpu (launcher ray, 1 threads a rank) |" in top
    assert "| versions | torch 2.13.0 (before: torch 2.12.0) |" in top and "| commit | not a git repository |" in top
    assert "processor A \\| B, cores 2" in top and "| first start | 2026-01-02 03:04:05 UTC |" in top
