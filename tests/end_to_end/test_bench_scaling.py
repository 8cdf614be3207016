"""`trimtab bench scaling` from the command line to its files, in small; what is done is not run again."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main


def test_measures_two_sizes_and_refuses_losses_that_differ(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    arguments = [
        "bench", "scaling", "--preset", str(config), "--sizes", "1", "2", "--modes", "strong", "--routings", "even",
        "--repeats", "1", "--steps", "2", "--warm-up", "1", "--out", str(out), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "[2/2] 2-ranks-4-sequences-even-1" in said.err
    record = json.loads(said.out.splitlines()[-1])
    assert record == json.loads((out / "scaling.json").read_text())
    one, two = record["rows"]
    assert (one["ranks"], two["ranks"], one["ep_size"], two["ep_size"]) == (1, 2, 1, 2)
    assert one["efficiency"]["median"] == 1 and 0 < two["efficiency"]["median"] < 2
    assert sum(two["lost"].values()) == pytest.approx(1 - two["efficiency"]["median"])
    assert two["loss_difference"] <= 1e-5 and record["losses_agree"] and two["mib_sent_a_rank"] > 0
    assert min(two["seconds"][part] for part in ("compute", "optimizer", "ZeRO", "all-to-all", "rest")) > 0
    with (out / "scaling.csv").open() as file:
        assert [row["ranks"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (out / "scaling.png").stat().st_size > 1000
    assert not list(out.glob("runs/*/checkpoints/*"))

    path = out / "results" / "2-ranks-4-sequences-even-1.json"
    result = json.loads(path.read_text())
    exposed = np.array([[step["all_to_all"] for step in steps] for steps in result["ranks"]])  # (2, 3)
    for number, step in enumerate(result["metrics"]):  # the ranks' own figures are those that the metrics are made of
        assert step["exposed_all_to_all_seconds"] == pytest.approx(exposed[0, number], rel=1e-4)
        waited = (exposed[:, number] - exposed[:, number].min()).mean()
        assert step["waiting_seconds"] == pytest.approx(waited, rel=1e-4, abs=1e-9)
        assert step["max_vio"] < 0.1  # forced: prediction modules see one place less, nothing else is uneven
    for steps in result["ranks"]:
        for step in steps:
            assert 0 < step["zero_in_model"] + step["zero_in_update"] < step["model"] + step["update"]
            assert 0 < step["all_to_all"] < step["model"] and step["other"] > 0
            assert sum(step["calls"]["all_to_all"]) == pytest.approx(step["all_to_all"])
            assert sum(step["calls"]["other"]) == pytest.approx(step["other"])

    result["metrics"][1]["loss"] *= 1.001
    path.write_text(json.dumps(result))
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "2 of 2 runs are done already" in said.err and "LOSSES DO NOT AGREE" in said.out
    assert main([*arguments, "--set", "train.seed=5"]) == 2
    assert "is the result of other settings" in capsys.readouterr().err
