"""What a resumed run may change."""

import pytest

from launch.config import read
from launch.resume import differences, refused_changes


@pytest.mark.parametrize(
    "assignment",
    ["train.steps=9", "cluster.workers=4", "parallel.zero_stage=3", "train.micro_batch_size=2",
     "checkpoint.every_steps=3", "telemetry.heatmap_every_steps=5", "optimizer.lr=1e-4", "data.path=elsewhere"],
)  # fmt: skip
def test_layout_length_and_saving_may_change(assignment: str) -> None:
    old, new = read("debug", [], []), read("debug", [assignment], [])
    assert len(differences(old, new)) == 1
    assert refused_changes(old, new, ()) == []


@pytest.mark.parametrize(
    "assignment",
    ["model.hidden_size=64", "data.seq_len=128", "data.seed=1", "data.packing=best_fit", "data.lanes=96",
     "train.global_batch_size=32", "train.seed=1"],
)  # fmt: skip
def test_model_data_order_batch_and_seed_may_not(assignment: str) -> None:
    old, new = read("debug", [], []), read("debug", [assignment], [])
    key = assignment.split("=")[0]
    (problem,) = refused_changes(old, new, ())
    assert problem.startswith(f"{key} = ")
    assert f"--accept-change {key}" in problem
    assert refused_changes(old, new, (key,)) == []
    assert refused_changes(old, new, (key.split(".")[0],)) == []
