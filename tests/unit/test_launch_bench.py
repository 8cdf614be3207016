"""`trimtab bench loader`: the peers run in one call, the record holds what the table says."""

import csv
import json
from pathlib import Path

import pytest

from launch.bench_record import Spread, machine
from launch.cli import main


def test_loader_measures_every_peer_and_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("webdataset")
    status = main(
        ["bench", "loader", "--megatokens", "0.2", "--seq-len", "64", "--repeats", "2", "--resume-samples", "100",
         "--index-documents", "50000", "--out", str(tmp_path), "--json"]
    )  # fmt: skip
    assert status == 0
    said = capsys.readouterr().out.splitlines()
    record = json.loads(said[-1])
    assert record == json.loads((tmp_path / "loader.json").read_text())
    loaders = [row["loader"] for row in record["rows"]]
    assert loaders[:4] == ["trimtab, first pass", "trimtab", "mapped, same output", "mapped, tokens"]
    assert {"webdataset", "streaming", "energon"} <= {*loaders, *record["absent"]}
    for row in record["rows"]:
        rate = row["tokens_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"] and rate["repeats"] == 2
        assert row["resume_seconds"]["median"] > 0
    assert [row["step"] for row in record["index"]["rows"]] == [10, 10_000, 1_000_000] * 2
    assert record["machine"]["packages"]["torch"] and record["machine"]["cores"] >= 1
    with (tmp_path / "loader.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loader"] for row in rows] == loaders and float(rows[0]["tokens_per_second_median"]) > 0
    assert any("times webdataset (aim 1.5" in line for line in said)
    assert (tmp_path / "loader.png").stat().st_size > 1000


def test_spread_and_machine() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert machine(["no-such-package"])["packages"] == {"no-such-package": None}
