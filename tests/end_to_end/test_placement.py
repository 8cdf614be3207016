"""`balance.placement = "load"` through a whole run: the losses of the fixed placement, even ranks, exact resume."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.context import RankContext
from launch.config import read
from launch.runfolder import RunFolder
from launch.worker import main
from tests.end_to_end.conftest import events, metrics

SAME = ("step", "loss", "grad_norm", "tokens_per_expert", "expert_bias", "max_vio", "max_vio_rank", "placement")
ASSIGNMENTS = [
    "parallel.virtual_ranks=2", "parallel.ep_size=2", "optimizer.schedule=constant", "balance.placement_min_gain=0.0",
    "checkpoint.every_steps=2", "telemetry.console=off",
]  # fmt: skip


@pytest.fixture
def trained(config: Path, tmp_path: Path):
    """Trains a run of this folder in this process on virtual ranks, as far as it is told; resumes where it can."""

    def go(name: str, *assignments: str) -> Path:
        problems: list[str] = []
        resolved = read(str(config), [*ASSIGNMENTS, *assignments], problems)
        assert not problems
        run = RunFolder(tmp_path / name)
        if not run.is_run():
            run.path.mkdir()
            run.config.write_text("")
        payload = {"config": asdict(resolved), "run": str(run.path), "resume": "auto", "accepted": [], "cause": "test"}
        main(RankContext(0, 1, 0, 1, 0, 1, ""), payload)
        return run.path

    return go


def rank_skew(run: Path) -> list[float]:
    return [record["max_vio_rank"] for record in metrics(run)]


def moves(run: Path) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["kind"] == "placement"]


def test_a_run_that_moves_its_experts(trained, tmp_path: Path) -> None:
    fixed = trained("fixed")
    moved = trained("moved", "balance.placement=load")
    assert [r["loss"] for r in metrics(moved)] == pytest.approx([r["loss"] for r in metrics(fixed)], rel=1e-6)
    assert [r["tokens_per_expert"] for r in metrics(moved)] == [r["tokens_per_expert"] for r in metrics(fixed)]
    assert rank_skew(moved)[:2] == rank_skew(fixed)[:2]
    assert sum(rank_skew(moved)[2:]) < 0.7 * sum(rank_skew(fixed)[2:])
    assert not moves(fixed)
    assert [event["step"] for event in moves(moved)] == [2, 4]
    first = moves(moved)[0]
    assert first["layers_changed"] >= 1 and first["experts_moved"] >= 2 and first["seconds_taken"] >= 0
    before = [sum(layer) for layer in zip(*(loads_by_rank(record) for record in metrics(moved)[:2]), strict=True)]
    assert first["max_vio_rank_before"] == pytest.approx(mean_excess(before), abs=1e-5)
    assert first["max_vio_rank_expected"] < first["max_vio_rank_before"]

    half = trained("half", "balance.placement=load", "train.steps=2")
    assert not moves(half), "after the last step nobody moves, but the checkpoint says where to go on"
    trained("half", "balance.placement=load")
    for key in SAME:
        assert [r.get(key) for r in metrics(half)] == [r.get(key) for r in metrics(moved)], key
    told = json.loads((half / "checkpoints" / "step-00000004" / "manifest.json").read_text())["placement"]
    assert told == {"ep_size": 2, "expert_of_slot": metrics(half)[4]["placement"]}


def loads_by_rank(record: dict[str, Any]) -> list[float]:
    """Loads of rank 0 and rank 1, layer after layer, with the experts in order."""
    return [sum(half) for layer in record["tokens_per_expert"] for half in (layer[:4], layer[4:])]


def mean_excess(loads: list[float]) -> float:
    pairs = list(zip(loads[::2], loads[1::2], strict=True))
    return sum(max(pair) / (sum(pair) / 2) - 1 for pair in pairs) / len(pairs)


def test_another_ep_size_starts_in_order(trained) -> None:
    run = trained("run", "balance.placement=load", "train.steps=2")
    table = json.loads((run / "checkpoints" / "step-00000002" / "manifest.json").read_text())["placement"]
    assert table["expert_of_slot"] != [list(range(8))] * len(table["expert_of_slot"])
    trained("run", "balance.placement=load", "train.steps=3", "parallel.virtual_ranks=4", "parallel.ep_size=4")
    other = trained("other", "train.steps=3")
    assert metrics(run)[2].get("placement") is None
    assert metrics(run)[2]["loss"] == pytest.approx(metrics(other)[2]["loss"], rel=1e-5)
