"""`trimtab bench dispatch`: every way runs, bytes are those of the formula, the modelled link is slow."""

import json
import time
from pathlib import Path

import pytest
import torch

from launch.bench_dispatch_rank import Shape, choose, names
from launch.bench_link import Link, SlowCommunicator
from launch.cli import main
from parallel.communicator import SingleCommunicator
from parallel.wire import layer_bytes


def test_measures_every_way_and_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status = main(
        ["bench", "dispatch", "--tokens", "64", "--hidden", "32", "--width", "16", "--repeats", "2",
         "--out", str(tmp_path), "--json"]
    )  # fmt: skip
    assert status == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "dispatch.json").read_text())
    shape = Shape(tokens=64, hidden=32, width=16)
    peers = {"torch all_to_all_single", "mpi4py Alltoallv"}
    for routing in ("natural", "even"):
        rows = {row["way"]: row for row in record["rows"] if row["routing"] == routing}
        assert {*rows, *record["absent"]} == {*names(shape), *peers}
        choices = [choose(shape, rank, routing).tolist() for rank in range(2)]
        for way, options in names(shape).items():
            formula = layer_bytes(
                options["kind"], choices, 16, 32, 4, payload=options.get("payload", "auto"),
                chunks=options.get("chunks", 1),
            )  # fmt: skip
            assert rows[way]["bytes_sent"] == max(part.counts + part.forward + part.backward for part in formula)
            took = rows[way]["seconds"]
            assert 0 < took["least"] <= took["median"] <= took["greatest"] and took["repeats"] == 2
            assert rows[way]["exposed_seconds"]["median"] > 0
    assert record["machine"]["packages"]["torch"]
    assert (tmp_path / "dispatch.csv").exists() and (tmp_path / "dispatch.png").stat().st_size > 1000


def test_shapes_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "dispatch", "--ranks", "3", "--nodes", "2"]) == 2
    assert "--ranks 3 must be a multiple of --nodes 2" in capsys.readouterr().err


def test_the_modelled_link_carries_one_transfer_after_the_other() -> None:
    link = Link(gigabits=8e-3, latency_s=0.0)  # a million bytes a second
    communicator = SlowCommunicator(SingleCommunicator(), [True], link)
    rows = torch.zeros(10, 500)  # 20,000 bytes: 20 ms
    link.free_at = time.perf_counter() + 0.1
    busy_until = link.free_at
    both = [communicator.start_all_to_all(rows, [10], [10]) for _ in range(2)]
    assert link.free_at == pytest.approx(busy_until + 0.04, abs=1e-6)
    assert all(pending.wait() is rows for pending in both)
    assert time.perf_counter() >= busy_until + 0.04
    assert communicator.far_bytes == 40_000
    assert communicator.traffic.exposed_seconds > 0
