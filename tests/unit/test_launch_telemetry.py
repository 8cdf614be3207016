"""One record a step: the contract's figures against literal computations, and what TensorBoard reads back."""

import gzip
import json
import lzma
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import balance_stats, compressors
from launch.alarms import Alarms
from launch.console import Console
from launch.runfolder import RunFolder, committed_metrics, read_records
from launch.step_record import CONTRACT_KEYS, StepRecord, derive
from launch.telemetry import ALARM_LINES, Telemetry
from launch.tensorboard import TensorBoard, how_to_view
from parallel.config import BalanceConfig

CONFIG = {"model": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}}
COUNTS = torch.tensor([[10, 0, 6, 8], [6, 6, 6, 6], [24, 0, 0, 0]])  # two MoE layers and one MTP block
BIAS = torch.tensor([[-0.001, 0.003, 0.0, -0.002], [0.0] * 4, [-0.25, 0.1, 0.1, 0.1]])


def step_record(step: int = 1, **changes: Any) -> StepRecord:
    record = StepRecord(
        step=step, tokens=step * 12, loss=2.0 / step, grad_norm=1.5, lr=1e-3, step_seconds=0.5, tokens_per_second=24.0,
        mfu=0.31, memory_gib=1.25, data_wait_seconds=0.01, all_to_all_seconds=0.05, world_size=2, ep_size=2,
        tokens_per_expert=COUNTS, expert_bias=BIAS, mtp_loss=2.5, sequence_balance=1.02, epoch=0,
    )  # fmt: skip
    return replace(record, **changes)


def open_telemetry(path: Path, **more: Any) -> Telemetry:
    run = RunFolder(path)
    run.create("")
    return Telemetry.open(run, CONFIG, total_steps=100, main=True, console_mode="off", **more)


def read_back(run: RunFolder) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return events


# --- metrics.jsonl ---


def test_every_key_of_the_contract_is_written_with_its_value(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    telemetry.log_step(step_record(changed_by_bias=torch.tensor([12, 0, 6]), extra={"evictions": 3}))
    telemetry.close()
    (record,) = read_records(telemetry.run.metrics_path)
    assert set(CONTRACT_KEYS) <= record.keys()
    assert record["step"] == 1 and record["tokens"] == 12 and record["loss"] == 2.0 and record["mfu"] == 0.31
    assert record["max_vio"] == pytest.approx((4 / 6 + 0.0 + 3.0) / 3, abs=1e-5)
    assert record["max_vio_rank"] == pytest.approx((2 / 12 + 0.0 + 1.0) / 3, abs=1e-5)
    assert record["dead_experts"] == 4
    assert record["bias_abs_max"] == 0.25
    assert record["max_vio_per_layer"] == pytest.approx([4 / 6, 0.0, 3.0], abs=1e-5)
    assert record["tokens_per_expert"] == COUNTS.tolist()
    assert record["changed_by_bias_share"] == 18 / 72
    assert record["evictions"] == 3


def test_losses_and_biases_are_written_exactly(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    bias = torch.zeros(2, 8)
    for step in range(1, 40):  # fp32 sums of 0.001 are no round decimals
        bias += 0.001 * torch.randn(2, 8).sign()
        counts = torch.full((2, 8), 5)
        telemetry.log_step(step_record(step, loss=1 / 3 + step, expert_bias=bias, tokens_per_expert=counts))
    record = committed_metrics(telemetry.run)[-1]
    assert record["loss"] == 1 / 3 + 39
    assert torch.equal(torch.tensor(record["expert_bias"]), bias)
    assert "0.00300000002" not in json.dumps(record["expert_bias"])


def test_what_is_not_finite_becomes_null_with_a_note(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    telemetry.log_step(step_record(loss=math.nan, grad_norm=math.inf, expert_bias=BIAS / 0))
    text = telemetry.run.metrics_path.read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["grad_norm"] is None and record["bias_abs_max"] is None
    assert record["non_finite"]["loss"] == "nan" and record["non_finite"]["grad_norm"] == "inf"
    assert record["expert_bias"][0][2] is None


def test_a_dense_model_has_no_balance(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    none = torch.zeros(0, 0, dtype=torch.int64)
    telemetry.log_step(step_record(tokens_per_expert=none, expert_bias=None, mtp_loss=None, mfu=None, ep_size=1))
    telemetry.close()
    (record,) = read_records(telemetry.run.metrics_path)
    assert set(CONTRACT_KEYS) <= record.keys() and "non_finite" not in record
    assert record["max_vio"] is None and record["max_vio_rank"] is None and record["mfu"] is None
    assert record["dead_experts"] == 0 and record["bias_abs_max"] == 0.0


def test_extra_figures_cannot_overwrite_the_contract() -> None:
    with pytest.raises(ValueError, match="would overwrite loss, max_vio"):
        derive(step_record(extra={"loss": 1.0, "max_vio": 0.0}))


def test_large_models_have_their_loads_now_and_then(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run", heatmap_every=5)
    counts = np.ones((9, 256), dtype=np.int64)
    for step in range(3, 13):  # a resumed run: its first record has them too
        telemetry.log_step(step_record(step, tokens_per_expert=counts, expert_bias=counts * 0.0))
    assert [r["step"] for r in committed_metrics(telemetry.run) if "tokens_per_expert" in r] == [3, 5, 10]
    assert all(len(r["max_vio_per_layer"]) == 9 for r in committed_metrics(telemetry.run))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create("")
    telemetry = Telemetry.open(run, CONFIG, total_steps=9, main=False)
    telemetry.log_step(step_record())
    telemetry.event("start", cause="x")
    telemetry.evaluation(1, {"loss": 1.0}, cause="x")
    telemetry.rewind(0, cause="x")
    telemetry.close()
    judge = Alarms(BalanceConfig(alarm_dead_steps=1), ["layer 1"], 4)
    telemetry.alarms(judge.judge(1, np.array([[4, 0, 0, 0]]), np.array([[4]])))
    assert [p.name for p in run.path.rglob("*") if p.is_file()] == ["config.toml"]


def test_events_go_to_the_file_and_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "run")
    run.create("")
    telemetry = Telemetry.open(run, CONFIG, total_steps=9, main=True, console_mode="plain")
    telemetry.event("save", cause="every 5 steps", step=5, path="checkpoints/step-00000005")
    assert read_records(run.events_path)[0]["path"] == "checkpoints/step-00000005"
    assert capsys.readouterr().out == "save at step 5: every 5 steps (path checkpoints/step-00000005)\n"


def test_figures_of_the_router_and_the_wire_are_written(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    more: dict[str, Any] = {
        "changed_by_bias": torch.tensor([12, 0, 6]), "gate_entropy": torch.tensor([1.0, 1.25, 0.5]).double(),
        "bytes_sent": 4096, "waiting_seconds": 0.0125, "bias_rate": 0.01,
    }  # fmt: skip
    telemetry.log_step(step_record(1, **more))
    telemetry.log_step(step_record(2))
    first, second = committed_metrics(telemetry.run)
    assert first["gate_entropy"] == pytest.approx(2.75 / 3, rel=1e-5)
    assert first["gate_entropy_per_layer"] == [1.0, 1.25, 0.5]
    assert first["changed_by_bias_share_per_layer"] == [0.5, 0.0, 0.25]
    assert first["dead_experts_per_layer"] == [1, 0, 3]
    assert (first["bytes_sent"], first["waiting_seconds"], first["bias_rate"]) == (4096, 0.0125, 0.01)
    for key in ("gate_entropy", "bytes_sent", "waiting_seconds", "bias_rate", "changed_by_bias_share"):
        assert second[key] is None
    assert "gate_entropy_per_layer" not in second and "coactivation" not in first


def test_ranks_are_judged_by_what_lies_on_them(tmp_path: Path) -> None:
    placement = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 3, 2]])
    moved = torch.tensor([[0, 2, 1, 3], [0, 1, 2, 3], [1, 0, 3, 2]])  # rank 0 holds experts 0 and 2 of the first layer
    telemetry = open_telemetry(tmp_path / "run")
    for step, table in enumerate((None, placement, moved), start=1):
        telemetry.log_step(step_record(step, placement=table))
    vio = [record["max_vio_rank"] for record in committed_metrics(telemetry.run)]
    assert vio[0] == vio[1] == pytest.approx((2 / 12 + 0 + 1) / 3, rel=1e-5)
    assert vio[2] == pytest.approx((4 / 12 + 0 + 1) / 3, rel=1e-5)  # 10 + 6 against 0 + 8
    last = committed_metrics(telemetry.run)[-1]
    assert last["placement"] == moved.tolist() and last["tokens_per_expert"] == COUNTS.tolist()  # logical numbers


def test_alarms_are_events_and_a_flood_of_them_does_not_fill_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    run.create("")
    telemetry = Telemetry.open(run, CONFIG, total_steps=9, main=True, console_mode="plain")
    judge = Alarms(BalanceConfig(alarm_dead_steps=1), ["layer 1"], 16)
    counts = np.array([[64] + [0] * 15])
    telemetry.alarms(judge.judge(7, counts, counts))
    events = read_records(run.events_path)
    assert [(e["kind"], e["alarm"], e["layer"], e["expert"], e["step"]) for e in events] == [
        ("alarm", "dead_expert", "layer 1", expert, 7) for expert in range(1, 16)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "alarm at step 7: layer 1: expert 1 has had no token for 1 step"
    assert len(lines) == ALARM_LINES + 1 and lines[-1].startswith("and 10 more alarms at this step")


def test_the_newest_pairs_of_experts_replace_those_before(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run")
    pairs = torch.arange(48).reshape(3, 4, 4)
    for step, seen in ((1, pairs), (2, None), (3, pairs + 1)):
        telemetry.log_step(step_record(step, coactivation=seen))
    telemetry.close()
    record = json.loads((telemetry.run.path / "coactivation.json").read_text())
    assert record == {"step": 3, "layers": ["layer 1", "layer 2", "mtp 0"], "pairs": (pairs + 1).tolist()}
    assert not list(telemetry.run.path.glob(".coactivation*"))
    assert [image.step for image in read_back(telemetry.run).Images("coactivation/mtp_0")] == [1, 3]


# --- TensorBoard ---


def test_a_run_is_one_line_in_tensorboard_and_steps_done_again_replace(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    telemetry = open_telemetry(tmp_path / "runs" / "first")
    for step in (1, 2, 3):
        telemetry.log_step(step_record(step))
    telemetry.close()
    again = open_telemetry(tmp_path / "runs" / "first")
    again.rewind(1, cause="resume from step 1")
    again.log_step(step_record(2))
    again.log_step(step_record(3))
    again.rewind(1, cause="rolled back while running")
    again.log_step(step_record(2, tokens_per_expert=COUNTS * 4))
    again.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs"))
    runs.Reload()
    assert list(runs.Runs()) == ["first/tensorboard"]  # the floor is a figure of its own, not a second run
    floor = balance_stats.noise_floor(4, 24)
    values = [(s.step, s.value) for s in runs.Scalars("first/tensorboard", "balance/max_vio_floor")]
    assert values == [(1, pytest.approx(floor)), (2, pytest.approx(floor / 2))]  # the steps done again replace


def test_every_chart_of_the_layout_finds_its_figures(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    telemetry = open_telemetry(tmp_path / "run")
    more: dict[str, Any] = {"changed_by_bias": torch.tensor([1, 2, 3]), "gate_entropy": torch.ones(3)}
    telemetry.run.event("launch", cause="trimtab train debug", seconds_before=2.0)
    telemetry.open_account("starting")
    telemetry.log_step(step_record(1, waiting_seconds=0.1, extra={"slowest_rank_ratio": 1.2}, **more))
    telemetry.close()
    events = read_back(telemetry.run)
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    scalars = events.Tags()["scalars"]
    drawn = {
        chart.title: {tag for pattern in chart.multiline.tag for tag in scalars if re.match(pattern, tag)}
        for category in layout.category
        for chart in category.chart
    }
    assert drawn["max_vio: experts, ranks, noise floor"] == {f"balance/max_vio{end}" for end in ("", "_rank", "_floor")}
    for title, key in (("gate entropy", "gate_entropy"), ("share of choices", "changed_by_bias_share"),
                       ("experts without", "dead_experts")):  # fmt: skip
        (tags,) = [tags for name, tags in drawn.items() if name.startswith(title)]
        assert tags == {f"balance_by_layer/{key}/{layer}" for layer in ("layer_1", "layer_2", "mtp_0")}
    assert all(drawn.values())


def test_tensorboard_reads_back_the_same_figures(tmp_path: Path) -> None:
    telemetry = open_telemetry(tmp_path / "run", heatmap_every=2)
    for step in (1, 2, 3, 4):
        telemetry.log_step(step_record(step))
    telemetry.evaluation(4, {"bits_per_byte": 2.25}, cause="held-out files")
    telemetry.close()
    events = read_back(telemetry.run)
    scalars = events.Tags()["scalars"]
    for key in set(CONTRACT_KEYS) - {"step"}:
        assert any(tag.split("/")[-1] == key for tag in scalars), key
    for layer in ("layer_1", "layer_2", "mtp_0"):
        assert f"balance_by_layer/max_vio/{layer}" in scalars
    assert [(s.step, s.value) for s in events.Scalars("train/loss")] == [
        (1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3)), (4, 0.5),
    ]  # fmt: skip
    assert events.Scalars("balance_by_layer/max_vio/mtp_0")[0].value == 3.0
    assert events.Scalars("evaluation/bits_per_byte")[0].value == 2.25
    assert [image.step for image in events.Images("balance/load_heat_map")] == [1, 2, 4]
    histogram = events.Histograms("balance/expert_bias")[0].histogram_value
    assert histogram.num == 12 and histogram.min == -0.25 and sum(histogram.bucket) == 12
    assert "configuration/text_summary" in events.Tags()["tensors"] or "configuration" in events.Tags()["tensors"]


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    first = open_telemetry(tmp_path / "run")
    for step in range(1, 7):
        first.log_step(step_record(step, loss=1.0))
    first.close()
    second = open_telemetry(tmp_path / "run")
    second.rewind(3, cause="resume from step 3")
    second.log_step(step_record(4, loss=9.0))
    second.close()
    losses = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]
    assert [(s.step, s.value) for s in read_back(second.run).Scalars("train/loss")] == losses
    assert [(r["step"], r["loss"]) for r in committed_metrics(second.run)] == losses


def test_what_is_written_is_on_disk_after_a_few_seconds(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, flush_s=0.2)
    for step in range(3):
        board.scalars(step, {"train/loss": 1.0})
        time.sleep(0.15)
    deadline = time.monotonic() + 5
    run = RunFolder(tmp_path)
    run.tensorboard = tmp_path
    while time.monotonic() < deadline and "train/loss" not in read_back(run).Tags()["scalars"]:
        time.sleep(0.1)
    assert len(read_back(run).Scalars("train/loss")) >= 1  # without close or flush
    board.close()


def test_without_tensorboard_the_writer_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    said: list[str] = []
    board = TensorBoard(tmp_path / "tb", say=said.append)
    telemetry = Telemetry(RunFolder(tmp_path), CONFIG, Console(9, mode="off"), board)
    telemetry.log_step(step_record())
    telemetry.close()
    assert len(said) == 1 and "pip install tensorboard" in said[0] and not board.available
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_a_full_disk_ends_the_figures_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    board = TensorBoard(tmp_path / "tb", say=said.append)

    def full(event: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "add_event", full)
    for step in (1, 2):
        board.scalars(step, {"train/loss": 1.0})
    assert len(said) == 1 and "No space left" in said[0] and not board.available


def test_the_hint_for_viewing_stays_on_this_machine() -> None:
    assert how_to_view("runs/debug") == "tensorboard --logdir runs --host 127.0.0.1"
    assert how_to_view("mine") == "tensorboard --logdir . --host 127.0.0.1"


# --- compressors ---


def test_compressors_read_the_joined_documents() -> None:
    documents = [b"def f(x):\n    return x\n" * 40, b"def f(x):\n    return x\n" * 40]
    together = compressors.compressed_sizes(documents)
    assert together == compressors.compressed_sizes([b"".join(documents)])
    assert together.raw_bytes == 1840
    assert together.gzip_bits_per_byte == 8 * together.gzip_bytes / 1840 < 1
    assert together.xz_bits_per_byte is not None and together.xz_bits_per_byte < 1


def test_compressors_work_at_their_strongest() -> None:
    text = Path(json.__file__).with_name("decoder.py").read_bytes() * 2
    sizes = compressors.compressed_sizes([text])
    assert sizes.gzip_bytes == len(gzip.compress(text, 9, mtime=0)) < len(gzip.compress(text, 1, mtime=0))
    assert sizes.xz_bytes == len(lzma.compress(text, preset=9)) < len(lzma.compress(text, preset=0))


def test_a_python_without_lzma_has_gzip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)
    sizes = compressors.compressed_sizes([b"abc"])
    assert sizes.xz_bytes is None and sizes.xz_bits_per_byte is None and sizes.gzip_bytes > 0


def test_bits_per_byte_of_a_model() -> None:
    assert compressors.bits_per_byte(math.log(2.0) * 16, 8) == pytest.approx(2.0)
    assert compressors.bits_per_byte(256 * math.log(256.0), 256) == pytest.approx(8.0)
