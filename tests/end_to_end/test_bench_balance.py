"""`trimtab bench balance` from the command line to its files, in small; what is done is not trained again."""

import csv
import json
from pathlib import Path

import pytest

from launch.cli import main

SMALL = (
    "model.vocab_size=257", "model.hidden_size=32", "model.num_attention_heads=2", "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.moe_intermediate_size=16",
    "model.intermediate_size=80", "data.seq_len=32", "train.global_batch_size=2", "train.micro_batch_size=2",
)  # fmt: skip


def test_trains_compares_and_goes_on(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    arguments = [
        "bench", "balance", "--rules", "quantile", "--also", "dense", "--seeds", "1", "--steps", "10", "--jobs", "2",
        "--data", str(dataset), "--out", str(out), "--json",
    ]  # fmt: skip
    for assignment in SMALL:
        arguments += ["--set", assignment]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((out / "balance.json").read_text())
    sparse, dense = record["rows"]
    assert (sparse["arm"], dense["arm"]) == ("quantile", "dense") and dense["step_max_vio"] is None
    assert abs(dense["parameters"] / sparse["active_parameters"] - 1) < 0.01
    assert 0 < sparse["heldout_loss"]["median"] < 6 and sparse["heldout_max_vio"]["median"] > 0
    training = json.loads((out / "trainings" / "quantile-seed0.json").read_text())
    assert [sum(row) for row in training["heldout_counts"]] == [4 * training["heldout_tokens"]] * 2
    assert len(training["series"]["max_vio"]) == 10 and training["bias_abs_max"] > 0
    with (out / "balance.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["quantile", "dense"]
    for name in ("balance.png", "balance-steps.png"):
        assert (out / name).stat().st_size > 1000

    written = {path: path.stat().st_mtime_ns for path in (out / "trainings").iterdir()}
    assert main(arguments) == 0
    assert "2 of 2 trainings are done already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (out / "trainings").iterdir()} == written
    assert main([*arguments, "--set", "train.mtp_loss_weight=0.1"]) == 2
    assert "is the result of another configuration" in capsys.readouterr().err
