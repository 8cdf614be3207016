"""What a resumed run may change, and which checkpoint it is judged by."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launch import preflight
from launch.config import ConfigError, dump, read
from launch.resume import differences, refused_changes, saved_config
from tests import object_store
from tests.object_store import ObjectStore


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


def half_renamed(folder: Path, *, seed: int = 0) -> Path:
    """A run whose only checkpoint was moved aside for another save of its step when everything stopped."""
    config = read("debug", [f"train.seed={seed}"], [])
    aside = folder / "checkpoints" / ".step-00000004.old"
    aside.mkdir(parents=True)
    (folder / "config.toml").write_text(dump(config))
    (aside / "manifest.json").write_text(json.dumps({"config": asdict(config)}))
    (aside / "COMMIT").write_text("x")
    (folder / "checkpoints" / ".step-00000008.tmp").mkdir()
    return folder


def run_problems(folder: Path, resume: str) -> list[str]:
    """What preflight has against going on in a folder."""
    problems: list[str] = []
    preflight._check_run(folder, read("debug", [], []), resume, (), None, problems, [])
    return problems


def test_a_checkpoint_between_two_renames_is_one(tmp_path: Path) -> None:
    saved = saved_config(half_renamed(tmp_path / "a"), read("debug", [], []))
    assert saved is not None and saved.step == 4
    assert run_problems(tmp_path / "a", "must") == run_problems(tmp_path / "a", "auto") == []
    assert "already has the checkpoint" in run_problems(tmp_path / "a", "never")[0]
    assert "train.seed" in run_problems(half_renamed(tmp_path / "b", seed=7), "auto")[0]
    assert (tmp_path / "a" / "checkpoints" / ".step-00000004.old").is_dir(), "looking changes nothing"


def test_a_run_at_an_address_is_known_on_a_machine_that_has_not_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.register()
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path))
    at = ("checkpoint.dir=objects://bucket/run", "checkpoint.timeout_s=0.3")
    config = read("debug", [*at], [])
    assert saved_config(tmp_path / "none", config) is None
    trained = read("debug", [*at, "train.seed=3"], [])
    ObjectStore.file("bucket/run/step-00000010/manifest.json").write_text(json.dumps({"config": asdict(trained)}))
    assert saved_config(tmp_path / "none", config) is None
    ObjectStore.file("bucket/run/step-00000010/COMMIT").write_text("x")
    saved = saved_config(tmp_path / "none", config)
    assert saved is not None and (saved.step, saved.config.train.seed) == (10, 3)
    assert len(refused_changes(saved.config, config, ())) == 1

    def away(operation: str, name: str) -> None:
        raise OSError("503")

    monkeypatch.setattr(ObjectStore, "before", staticmethod(away))
    with pytest.raises(ConfigError, match=r"checkpoint\.dir = objects://bucket/run: .*not done within"):
        saved_config(tmp_path / "none", config)
