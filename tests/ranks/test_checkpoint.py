"""Checkpoints: continuing is bit for bit the undisturbed run, and any layout reads any other's."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import checkpoint, retention, saving
from parallel.engine import PlainEngine
from parallel.ranks import process_ranks, single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks
from tests.ranks import training
from tests.ranks.spawn import run_ranks


def zero_engine(ranks, model, stage: int, rank: int):
    """A DeepSpeed engine for the tiny run, one micro-step."""
    from parallel.zero import ZeroEngine

    return ZeroEngine(
        model, training.OPTIMIZER, ranks.layout, stage=stage, n_experts=training.MODEL.n_routed_experts,
        precision="fp32", micro_batch_size=training.SEQUENCES // ranks.layout.world_size, accumulation_steps=1,
        device=torch.device("cpu"), local_rank=rank,
    )  # fmt: skip


def save(path: Path, engine, model, ranks, step: int) -> None:
    """Saves with the least that a checkpoint needs."""
    extra = {"optimizer_steps": engine.optimizer_steps}
    saving.save(path, step, engine, training.routers(model), extra, ranks.dp)


def load(path: Path, engine, model, ranks) -> int:
    """Loads the newest."""
    saved = checkpoint.open_checkpoint(checkpoint.committed(path)[-1])
    checkpoint.load(saved, engine, training.routers(model), ranks.dp)
    return saved.step


def ten_and_five_plus_five(rank: int, world_size: int, payload: dict) -> list[dict]:
    """For each [ep, stage]: ten steps at once, and five, saved, loaded into a fresh engine, five more."""
    results = []
    for ep_size, stage in payload["cases"]:
        ranks = process_ranks(ep_size, 60)
        folder = Path(payload["folder"]) / f"{ep_size}-{stage}"
        model = training.build(ranks, recompute=False)
        engine = zero_engine(ranks, model, stage, rank)
        first = training.train(engine, model, ranks, 1, range(5))
        save(folder, engine, model, ranks, 5)
        rest = training.train(engine, model, ranks, 1, range(5, 10))
        engine.close()
        other = training.build(
            ranks, recompute=False, seed=99
        )  # other start values: everything must come from the file
        resumed = zero_engine(ranks, other, stage, rank)
        step = load(folder, resumed, other, ranks)
        again = training.train(resumed, other, ranks, 1, range(step, 10))
        resumed.close()
        results.append({"first": first, "rest": rest, "again": again})
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep_sizes"), [(2, [1, 2]), (4, [2])])
def test_resuming_is_bit_for_bit(tmp_path: Path, world: int, ep_sizes: list[int]) -> None:
    cases = [[ep_size, stage] for ep_size in ep_sizes for stage in range(4)]
    payload = {"cases": cases, "folder": str(tmp_path)}
    for results in run_ranks(world, "tests.ranks.test_checkpoint:ten_and_five_plus_five", payload):
        for case, result in zip(cases, results, strict=True):
            assert result["again"] == result["rest"], f"[ep, stage] {case}: five, saved, loaded, five is not ten"


def write_at(rank: int, world_size: int, payload: dict) -> str:
    """Five steps under ZeRO at one layout, saved."""
    ranks = process_ranks(payload["ep_size"], 60)
    model = training.build(ranks, recompute=False)
    engine = zero_engine(ranks, model, payload["stage"], rank)
    training.train(engine, model, ranks, 1, range(5))
    save(Path(payload["folder"]), engine, model, ranks, 5)
    return "saved"


def read_at(rank: int, world_size: int, payload: dict) -> list[dict]:
    """Continues a checkpoint at several other layouts: payload["cases"] = [[ep, stage], ...]."""
    results = []
    for ep_size, stage in payload["cases"]:
        ranks = process_ranks(ep_size, 60)
        model = training.build(ranks, recompute=False, seed=99)
        engine = zero_engine(ranks, model, stage, rank)
        step = load(Path(payload["folder"]), engine, model, ranks)
        results.append(training.train(engine, model, ranks, 1, range(step, 10)))
        engine.close()
    return results


def continue_alone(folder: Path) -> dict:
    """Continues a checkpoint in this process."""
    ranks = single_rank()
    model = training.build(ranks, recompute=False, seed=99)
    engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
    step = load(folder, engine, model, ranks)
    return training.train(engine, model, ranks, 1, range(step, 10))


@pytest.mark.slow
def test_any_layout_continues_any_other(tmp_path: Path) -> None:
    run_ranks(2, "tests.ranks.test_checkpoint:write_at", {"ep_size": 2, "stage": 1, "folder": str(tmp_path)})
    undisturbed = training.one_rank(steps=10)
    found = {"one process": continue_alone(tmp_path)}
    cases = [[1, 0], [2, 2], [4, 3]]
    for case, result in zip(
        cases,
        run_ranks(4, "tests.ranks.test_checkpoint:read_at", {"cases": cases, "folder": str(tmp_path)})[0],
        strict=True,
    ):
        found[f"4 ranks, [ep, stage] {case}"] = result
    for layout, result in found.items():
        assert result["losses"] == pytest.approx(undisturbed["losses"][5:], rel=1e-5), layout
        assert result["biases"] == undisturbed["biases"][5:], layout


def save_virtual(folder: Path, ep_size: int = 2) -> None:
    """Two virtual ranks train two steps and save."""

    def work(world: Any, rank: int) -> None:
        ranks = virtual_ranks(world, ep_size, rank)
        model = training.build(ranks, recompute=False)
        engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
        training.train(engine, model, ranks, 1, range(2))
        save(folder, engine, model, ranks, 2)

    run_virtual_ranks(2, work)


def test_the_folder_is_what_the_contract_says(tmp_path: Path) -> None:
    save_virtual(tmp_path)
    folder = tmp_path / "step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "COMMIT", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors",
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    name = "layers.1.mlp.experts.5.gate_up_proj"
    assert manifest["tensors"][name]["shape"] == [2 * training.MODEL.moe_intermediate_size, training.MODEL.hidden_size]
    assert set(manifest["tensors"][name]["runs"]) == {"weight", "exp_avg", "exp_avg_sq"}
    for entry in manifest["tensors"].values():
        for runs in entry["runs"].values():
            assert sum(run[2] for run in runs) == torch.Size(entry["shape"]).numel(), "every element exactly once"
    assert "layers.1.mlp.gate.e_score_correction_bias" in manifest["tensors"]


@pytest.mark.parametrize(
    "damage", ["byte", "truncated", "missing", "manifest", "swapped files", "swapped experts", "elsewhere", "no commit"]
)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    save_virtual(tmp_path)
    folder = tmp_path / "step-00000002"
    victim, manifest = folder / "rank-00001.safetensors", folder / "manifest.json"
    content = bytearray(victim.read_bytes())
    expected = "rank-00001"
    if damage == "byte":
        content[-9] ^= 1
        victim.write_bytes(content)
    elif damage == "truncated":
        victim.write_bytes(content[:-1])
    elif damage == "missing":
        victim.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
        expected = "manifest.json"
    elif damage == "swapped files":
        victim.rename(folder / "aside")
        (folder / "rank-00000.safetensors").rename(victim)
        (folder / "aside").rename(folder / "rank-00000.safetensors")
    elif damage == "swapped experts":  # of one size, in one file: nothing but the checksum can tell
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        first, other = (f"layers.1.mlp.experts.{number}.down_proj/weight@0" for number in (4, 5))
        text = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        assert header[first]["shape"] == header[other]["shape"]
        swapped = text.replace(first, "?").replace(other, first).replace("?", other)
        assert len(swapped) == len(text) and swapped != text
        content[8 : 8 + len(text)] = swapped.encode()
        victim.write_bytes(content)
    elif damage == "elsewhere":  # a manifest that was signed anew and points out of the folder
        text = manifest.read_text().replace("rank-00001.safetensors", "../../rank-00001.safetensors")
        manifest.write_text(text)
        (folder / "COMMIT").write_text(hashlib.sha256(text.encode()).hexdigest())
        expected = r"names files that no rank writes: '\.\./\.\./rank-00001"
    else:
        (folder / "COMMIT").unlink()
        assert checkpoint.committed(tmp_path) == []
        return
    with pytest.raises(checkpoint.CheckpointError, match=expected):
        continue_alone(tmp_path)


def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    save_virtual(tmp_path)
    folder = tmp_path / "step-00000002"
    trap = pickle.dumps(Trap())
    (folder / "rank-00000.safetensors").write_bytes(trap)
    with pytest.raises(checkpoint.CheckpointError, match="rank-00000"):
        continue_alone(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())  # and by somebody who signs it anew
    manifest["files"]["rank-00000.safetensors"] = {"size": len(trap), "sha256": hashlib.sha256(trap).hexdigest()}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "COMMIT").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(checkpoint.CheckpointError, match="is not a safetensors file"):
        continue_alone(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_stops_no_rank(tmp_path: Path, monkeypatch) -> None:
    save_virtual(tmp_path)
    before = (tmp_path / "step-00000002" / "COMMIT").read_text()
    real = saving.write

    def full(path: Path, tensors, halfway) -> dict:
        if "rank-00001" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, tensors, halfway)

    monkeypatch.setattr(saving, "write", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"rank 1 could not write .* No space left"):
        save_virtual(tmp_path)
    assert (tmp_path / "step-00000002" / "COMMIT").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"], "no draft is left"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    save_virtual(tmp_path)
    for step in (4, 6):
        (tmp_path / "step-00000002").rename(tmp_path / "moved")
        save_virtual(tmp_path)
        (tmp_path / "step-00000002").rename(checkpoint.step_folder(tmp_path, step))
        (tmp_path / "moved").rename(tmp_path / "step-00000002")
    (tmp_path / ".step-00000008.tmp").mkdir()
    assert [path.name for path in retention.prune(tmp_path, keep=2, newest=6)] == ["step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_prune_keeps_what_a_run_saved_after_it_went_back(tmp_path: Path) -> None:
    for step in (2, 4, 9):
        save_virtual(tmp_path)
        if step > 2:
            shutil.copytree(tmp_path / "step-00000002", checkpoint.step_folder(tmp_path, step))
    gone = retention.prune(tmp_path, keep=1, newest=4)  # 9 was damaged, the run went back to 2 and saved 4
    assert sorted(path.name for path in gone) == ["step-00000002", "step-00000009"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_another_model_is_refused_with_the_tensor_named(tmp_path: Path, monkeypatch) -> None:
    save_virtual(tmp_path)
    from dataclasses import replace

    monkeypatch.setattr(training, "MODEL", replace(training.MODEL, moe_intermediate_size=24))
    with pytest.raises(checkpoint.CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.gate_up_proj has shape"):
        continue_alone(tmp_path)
