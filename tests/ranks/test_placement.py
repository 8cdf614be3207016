"""Moving experts between ranks in the middle of a run: the same model and optimizer, the same losses, even ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.balance_stats import max_vio_rank
from model import slots
from parallel import checkpoint
from parallel.engine import KINDS, PlainEngine
from parallel.placement import balanced, identity, moved
from parallel.ranks import Ranks, process_ranks, single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks
from tests.ranks import training
from tests.ranks.spawn import run_ranks
from tests.ranks.test_checkpoint import load, save, zero_engine

BEFORE, AFTER = range(2), range(2, 4)  # steps before and after the move
EXPERTS = training.MODEL.n_routed_experts
LAYERS = len(training.MODEL.moe_layers)


def favour_the_first_rank(model: Any) -> None:
    """A bias under which every token goes to the first group of experts, which is the first half of the ranks."""
    for bias in training.routers(model).values():
        bias += torch.tensor([0.9, 0.8, 0.7, 0.6] + [0.0] * (EXPERTS - 4))


def move_in_the_middle(engine: Any, model: Any, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Trains, saves, goes on; and goes on once more from the same state with the experts on other ranks."""
    ep_size = ranks.layout.ep_size
    favour_the_first_rank(model)
    counts = np.sum(training.train(engine, model, ranks, 1, BEFORE)["counts"], axis=0)
    table = balanced(counts, ep_size, slots.placement(model).numpy())
    local = table.reshape(LAYERS, ep_size, -1)
    local[0] = np.roll(local[0], 1, axis=-1)  # no expert of this layer stays in its slot; not its own inverse
    save(folder / "fixed", engine, model, ranks, BEFORE.stop)
    fixed = training.train(engine, model, ranks, 1, AFTER)
    load(folder / "fixed", engine, model, ranks)
    path = checkpoint.committed(folder / "fixed")[-1]
    checkpoint.load_moved(path, engine, lambda: slots.place(model, torch.from_numpy(table)), ranks.dp)
    save(folder / "moved", engine, model, ranks, BEFORE.stop)
    result = {"table": table.tolist(), "fixed": fixed, "moved": training.train(engine, model, ranks, 1, AFTER)}
    save(folder / "later", engine, model, ranks, AFTER.stop)
    result["next"] = training.train(engine, model, ranks, 1, range(AFTER.stop, AFTER.stop + 1))
    load(folder / "later", engine, model, ranks)
    result["again"] = training.train(engine, model, ranks, 1, range(AFTER.stop, AFTER.stop + 1))
    return result


def judge(result: dict[str, Any], folder: Path, ep_size: int) -> None:
    """What must hold of any layout."""
    fixed, other, table = result["fixed"], result["moved"], np.array(result["table"])
    assert moved(identity(LAYERS, EXPERTS), table, ep_size).sum() >= 2 * LAYERS
    assert other["losses"] == pytest.approx(fixed["losses"], rel=1e-6)
    assert other["norms"] == pytest.approx(fixed["norms"], rel=1e-6)
    assert other["counts"] == fixed["counts"]
    assert other["biases"] == fixed["biases"]
    for counts in fixed["counts"]:
        assert max_vio_rank(counts, ep_size) > 0.9
        assert max_vio_rank(counts, ep_size, table) < 0.5 * max_vio_rank(counts, ep_size)
    assert result["again"] == result["next"], "resumed with the experts where they were"
    same_state_elsewhere(folder, table, ep_size)


def same_state_elsewhere(folder: Path, table: np.ndarray, ep_size: int) -> None:
    """Weights, both moments and biases are bit for bit the same; the experts that moved are written by other ranks."""
    before, after = (checkpoint.open_checkpoint(checkpoint.committed(folder / name)[0]) for name in ("fixed", "moved"))
    readers = checkpoint.CheckpointReader(before), checkpoint.CheckpointReader(after)
    assert before.manifest["tensors"].keys() == after.manifest["tensors"].keys()
    n_elsewhere = 0
    for name, entry in before.manifest["tensors"].items():
        numel = torch.Size(entry["shape"]).numel()
        for kind in entry["runs"]:
            assert torch.equal(*(reader.read(name, kind, 0, numel) for reader in readers)), f"{kind} of {name}"
        assert name.endswith("_bias") or set(entry["runs"]) == set(KINDS)
        runs = [saved.manifest["tensors"][name]["runs"]["weight"] for saved in (before, after)]
        homes = [{int(file[5:10]) % ep_size for file, *_ in of_one} for of_one in runs]  # rank-00003.safetensors
        n_elsewhere += ".experts." in name and homes[0] != homes[1]
    assert n_elsewhere == 2 * moved(identity(LAYERS, EXPERTS), table, ep_size).sum()


@pytest.mark.parametrize(("world_size", "ep_size"), [(4, 2), (4, 4)])
def test_virtual_ranks(tmp_path: Path, world_size: int, ep_size: int) -> None:
    def work(world: Any, rank: int) -> dict[str, Any]:
        ranks = virtual_ranks(world, ep_size, rank)
        model = training.build(ranks, recompute=ep_size == 2)
        engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
        return move_in_the_middle(engine, model, ranks, tmp_path)

    result = run_virtual_ranks(world_size, work)[0]
    judge(result, tmp_path, ep_size)
    assert continued_by_one(tmp_path / "later")["losses"] == pytest.approx(result["next"]["losses"], rel=1e-5)


def continued_by_one(folder: Path) -> dict[str, Any]:
    """One more step of a checkpoint, by a single rank that holds every expert in the slot of its number."""
    ranks = single_rank()
    model = training.build(ranks, recompute=False, seed=99)
    engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
    step = load(folder, engine, model, ranks)
    return training.train(engine, model, ranks, 1, range(step, step + 1))


def under_zero(rank: int, world_size: int, payload: dict) -> list[dict]:
    """`move_in_the_middle` for each stage; and each stage continues what the stage before it saved after its move."""
    results = []
    for number, stage in enumerate(payload["stages"]):
        ranks = process_ranks(2, 60)
        model = training.build(ranks, recompute=False)
        engine = zero_engine(ranks, model, stage, rank)
        result = move_in_the_middle(engine, model, ranks, Path(payload["folder"]) / str(stage))
        if number:
            other = Path(payload["folder"]) / str(payload["stages"][number - 1])
            slots.place(model, torch.arange(EXPERTS).expand(LAYERS, EXPERTS))
            step = load(other / "later", engine, model, ranks)
            result["of_other"] = training.train(engine, model, ranks, 1, range(step, step + 1))
        engine.close()
        results.append(result)
    return results


@pytest.mark.slow
def test_every_zero_stage(tmp_path: Path) -> None:
    stages = [1, 0, 2, 3]
    payload = {"stages": stages, "folder": str(tmp_path)}
    results = run_ranks(2, "tests.ranks.test_placement:under_zero", payload)[0]
    for number, (stage, result) in enumerate(zip(stages, results, strict=True)):
        judge(result, tmp_path / str(stage), 2)
        if number:
            assert result["of_other"]["losses"] == pytest.approx(results[number - 1]["next"]["losses"], rel=1e-5)


def test_a_share_that_starts_inside_an_expert_is_read_by_its_new_number(tmp_path: Path) -> None:
    """What ZeRO's partitions are: here those of two ranks that hold the same experts, cut in the middle of one."""

    def work(world: Any, rank: int) -> int:
        ranks = virtual_ranks(world, 2, rank)
        model = training.build(ranks, recompute=False)
        engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
        save(tmp_path, engine, model, ranks, 0)
        reader = checkpoint.CheckpointReader(checkpoint.open_checkpoint(checkpoint.committed(tmp_path)[0]))
        before = slots.local_experts(model)
        after = {name: (numbers[0], 7 - numbers[1], *numbers[2:]) for name, numbers in before.items()}
        n_cut = 0
        for shard in engine.state_shards():
            if shard.parameter in before:
                stem, _, leaf = shard.parameter.rpartition(".")
                numel = torch.Size(shard.shape[1:]).numel()
                names = [f"{stem}.{number}.{leaf}" for number in after[shard.parameter]]
                whole = torch.cat([reader.read(name, shard.kind, 0, numel) for name in names])
                expected = whole[shard.start : shard.start + shard.values.numel()]
                assert torch.equal(reader.shard(shard, after, before), expected)
                n_cut += shard.start % numel > 0
            else:
                assert reader.shard(shard, after, before) is shard.values, "what does not move is not read"
        return n_cut

    assert sum(run_virtual_ranks(6, work)) > 0


def test_a_damaged_checkpoint_moves_nothing(tmp_path: Path) -> None:
    def work(world: Any, rank: int) -> None:
        ranks = virtual_ranks(world, 2, rank)
        model = training.build(ranks, recompute=False)
        engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
        save(tmp_path, engine, model, ranks, 0)
        path = checkpoint.committed(tmp_path)[0]
        if rank == 0:
            victim = path / "rank-00001.safetensors"
            victim.write_bytes(victim.read_bytes()[:-1])
        ranks.dp.barrier()
        table = torch.arange(EXPERTS).flip(0).expand(LAYERS, EXPERTS)
        with pytest.raises(checkpoint.CheckpointError, match=r"rank-00001\.safetensors has"):
            checkpoint.load_moved(path, engine, lambda: slots.place(model, table), ranks.dp)
        assert torch.equal(slots.placement(model)[0], torch.arange(EXPERTS))

    run_virtual_ranks(2, work)
