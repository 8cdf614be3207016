"""Saving while training goes on: what is in the files, when they are published, and what happens when a disk fails."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import CheckpointConfig
from launch.runfolder import RunFolder, read_records
from launch.saves import Saves
from launch.telemetry import Telemetry
from parallel import checkpoint, retention, saving
from parallel.engine import PlainEngine
from parallel.ranks import process_ranks, virtual_ranks
from parallel.remote import RemotePath
from parallel.roots import committed
from parallel.saver import Outcome, Saver
from parallel.threads import run_virtual_ranks
from tests import object_store
from tests.object_store import ObjectStore
from tests.ranks import training
from tests.ranks.spawn import run_ranks
from tests.ranks.test_checkpoint import load, zero_engine


class Rank:
    """One virtual rank that has trained two steps, with its saver."""

    def __init__(self, world: Any, rank: int, folder: Path, **options: Any) -> None:
        self.ranks = virtual_ranks(world, 2, rank)
        self.rank = rank
        self.model = training.build(self.ranks, recompute=False)
        self.engine = PlainEngine(
            self.model, training.OPTIMIZER, self.ranks.layout, self.ranks.dp, self.ranks.edp
        )  # fmt: skip
        self.biases = training.routers(self.model)
        self.saver = Saver(folder, self.engine, self.biases, self.ranks.dp, **{"keep": 0, **options})
        self.train(range(2))

    def train(self, steps: range) -> dict:
        """Goes on."""
        return training.train(self.engine, self.model, self.ranks, 1, steps)

    def start(self, step: int, hook: saving.Hook = saving.no_hook) -> Outcome | None:
        """Begins to save."""
        return self.saver.start(step, {"optimizer_steps": self.engine.optimizer_steps}, hook)

    def save(self, step: int, hook: saving.Hook = saving.no_hook) -> Outcome:
        """Saves and waits."""
        return self.start(step, hook) or self.saver.finish()


def on_ranks(folder: Path, work: Callable[[Rank], Any], **options: Any) -> list[Any]:
    """Runs `work` on two virtual ranks that hold half of the experts each."""
    return run_virtual_ranks(2, lambda world, rank: work(Rank(world, rank, folder, **options)))


def checksums(folder: Path) -> dict[str, Any]:
    """Of every file of a checkpoint."""
    return checkpoint.open_checkpoint(folder).manifest["files"]


def test_a_snapshot_is_of_its_step_although_training_goes_on(tmp_path: Path) -> None:
    def work(one: Rank) -> None:
        gone_on = threading.Event()
        one.start(2, lambda point: gone_on.wait(60) and None if point == "before_write" else None)
        one.train(range(2, 4))  # weights, moments and the routing bias change in place
        assert not one.saver.done_here()
        gone_on.set()
        assert one.saver.finish().path == tmp_path / "step-00000002"
        saving.save(tmp_path, 4, one.engine, one.biases, {"optimizer_steps": 4}, one.ranks.dp)

    on_ranks(tmp_path, work)
    run_virtual_ranks(2, lambda world, rank: reference(Rank(world, rank, tmp_path / "waited")))
    for step in (2, 4):
        waited = checkpoint.step_folder(tmp_path / "waited", step)
        assert checksums(checkpoint.step_folder(tmp_path, step)) == checksums(waited), step
    assert checksums(tmp_path / "step-00000002") != checksums(tmp_path / "step-00000004")


def reference(one: Rank) -> None:
    """The same steps with saves that everybody waits for."""
    for step in (2, 4):
        saving.save(one.saver.root, step, one.engine, one.biases, {"optimizer_steps": step}, one.ranks.dp)
        one.train(range(2, 4))


def test_nothing_is_published_before_every_rank_has_written(tmp_path: Path) -> None:
    def work(one: Rank) -> None:
        released = threading.Event()

        def slow(point: str) -> None:
            if point == "mid_write" and one.rank == 1:
                released.wait(60)

        one.start(2, slow)
        while one.rank == 0 and not one.saver.done_here():
            pass
        done = one.ranks.dp.gather(one.saver.done_here())
        assert done == [True, False]
        assert checkpoint.committed(tmp_path) == []
        one.ranks.dp.barrier()
        released.set()
        assert one.saver.finish().path == tmp_path / "step-00000002"
        assert not one.saver.under_way

    on_ranks(tmp_path, work)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000002"]


def test_it_is_published_at_a_step_boundary_once_all_have_written(tmp_path: Path) -> None:
    def work(one: Rank) -> None:
        run = RunFolder(tmp_path / f"run-{one.rank}")
        run.create("")
        telemetry = Telemetry.open(run, {}, total_steps=9, main=True, console_mode="off")
        saves = Saves(CheckpointConfig(keep=0), one.saver, telemetry)
        assert saves.start(2, "a test", {"optimizer_steps": 2}) is None
        boundaries = 0
        while one.saver.under_way and boundaries < 2000:
            boundaries += 1
            time.sleep(0.005)  # a step
            saves.poll(sum(one.ranks.dp.gather(saves.done_here())))
        telemetry.close()
        assert not one.saver.under_way
        assert [event["path"] for event in read_records(run.events_path)] == [str(tmp_path / "step-00000002")]

    on_ranks(tmp_path, work)
    assert checksums(tmp_path / "step-00000002").keys() == {"rank-00000.safetensors", "rank-00001.safetensors"}


def test_only_one_save_is_under_way(tmp_path: Path) -> None:
    def work(one: Rank) -> None:
        one.start(2)
        with pytest.raises(RuntimeError, match="the save of step 2 is still under way"):
            one.start(3)
        one.saver.finish()

    on_ranks(tmp_path, work)


def test_the_points_and_their_order(tmp_path: Path) -> None:
    def work(one: Rank) -> list[str]:
        passed: list[str] = []
        one.save(2, passed.append)
        return passed

    of_all, of_first = ["before_write", "mid_write"], ["before_commit", "before_rename", "cleanup"]
    assert on_ranks(tmp_path, work) == [of_all + of_first, of_all]


@pytest.mark.parametrize(
    ("rank", "point"),
    [(0, "before_write"), (1, "before_write"), (1, "mid_write"), (0, "before_commit"), (0, "before_rename")],
)
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all(tmp_path: Path, rank: int, point: str) -> None:
    def work(one: Rank) -> list[Outcome]:
        def full(passed: str) -> None:
            if (one.rank, passed) == (rank, point):
                raise OSError(errno.ENOSPC, "No space left on device")

        outcomes = [one.save(2), one.save(3, full)]
        one.train(range(2, 4))
        return [*outcomes, one.save(4)]

    for good, bad, later in on_ranks(tmp_path, work):
        assert good.path and later.path and not bad.path
        assert f"rank {rank} could not" in bad.error and "No space left" in bad.error
        assert "earlier checkpoints are as they were" in bad.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"], "no draft is left"
    for step in (2, 4):
        assert checkpoint.damaged_files(checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path, step))) == []


def test_failing_to_delete_old_ones_does_not_fail_the_save(tmp_path: Path) -> None:
    def work(one: Rank) -> Outcome:
        def stuck(point: str) -> None:
            if point == "cleanup":
                raise OSError(errno.EBUSY, "busy")

        one.save(2)
        outcome = one.save(3, stuck)
        assert outcome.path and "busy" in outcome.not_removed
        return one.save(4)

    assert on_ranks(tmp_path, work, keep=1)[0].removed == ("step-00000002", "step-00000003")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    def work(one: Rank) -> Outcome | None:
        one.save(2)
        one.ranks.dp.barrier()
        monkeypatch.setattr(saving, "free_bytes", lambda folder: 100_000)
        one.ranks.dp.barrier()
        return one.start(3, lambda point: pytest.fail("it was written all the same"))

    for outcome in on_ranks(tmp_path, work):
        assert outcome is not None and outcome.path is None
        assert "rank 1 sees 0 MiB free" in outcome.error and "the checkpoint of step 3 needs" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_space_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    import shutil

    there = shutil.disk_usage(tmp_path).free
    assert saving.free_bytes(tmp_path / "not" / "yet") == pytest.approx(there, rel=0.05)


def test_a_disk_that_hangs_is_named_by_its_rank(tmp_path: Path) -> None:
    released = threading.Event()

    def work(one: Rank) -> None:
        one.start(2, lambda point: released.wait(60) and None if one.rank == 1 else None)
        with pytest.raises(checkpoint.CheckpointError, match=r"after 0 s ranks \[1\] are still writing .* step 2"):
            one.saver.finish()
        one.ranks.dp.barrier()
        released.set()
        one.saver.close()

    on_ranks(tmp_path, work, timeout_s=0.3)


def test_what_is_not_the_disks_fault_is_raised(tmp_path: Path) -> None:
    def work(one: Rank) -> None:
        def wrong(point: str) -> None:
            raise KeyError("a mistake in the program")

        one.start(2, wrong)
        with pytest.raises(KeyError, match="a mistake"):
            one.saver.finish()
        one.saver.close()

    on_ranks(tmp_path, work)


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def crash(point: str) -> None:
        """As if the process died just after the first rename."""
        final = tmp_path / "step-00000002"
        if point == "before_rename" and final.exists():
            final.rename(tmp_path / ".step-00000002.old")
            raise OSError("killed")

    def work(one: Rank) -> None:
        one.save(2)
        one.save(2, crash)

    on_ranks(tmp_path, work)
    assert checkpoint.committed(tmp_path) == []
    assert retention.recover(tmp_path) == [tmp_path / "step-00000002"]
    assert checkpoint.damaged_files(checkpoint.open_checkpoint(tmp_path / "step-00000002")) == []
    assert retention.recover(tmp_path) == []


def goes_on_while_saving(rank: int, world_size: int, payload: dict) -> list[dict]:
    """For each stage: two steps, a save that is held until two more are done; then these again from the checkpoint."""
    results = []
    for stage in payload["stages"]:
        ranks = process_ranks(2, 60)
        folder = Path(payload["folder"]) / str(stage)
        model = training.build(ranks, recompute=False)
        engine = zero_engine(ranks, model, stage, rank)
        training.train(engine, model, ranks, 1, range(2))
        saver = Saver(folder, engine, training.routers(model), ranks.dp, keep=1)
        gone_on = threading.Event()
        saver.start(2, {"optimizer_steps": 2}, lambda point, event=gone_on: event.wait(60) and None)
        undisturbed = training.train(engine, model, ranks, 1, range(2, 4))
        gone_on.set()
        assert saver.finish().path is not None
        load(folder, engine, model, ranks)
        results.append([undisturbed, training.train(engine, model, ranks, 1, range(2, 4))])
        engine.close()
    return results


@pytest.mark.slow
def test_under_zero(tmp_path: Path) -> None:
    payload = {"stages": [1, 2, 3], "folder": str(tmp_path)}
    for results in run_ranks(2, "tests.ranks.test_saver:goes_on_while_saving", payload):
        for stage, (undisturbed, again) in zip(payload["stages"], results, strict=True):
            assert again == undisturbed, f"stage {stage}"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """An empty address without renaming."""
    object_store.register()
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path / "objects"))
    return RemotePath("objects://bucket/run", 20.0)


def test_an_address_holds_what_a_folder_does(tmp_path: Path, address: RemotePath) -> None:
    def work(one: Rank) -> list[Any]:
        outcomes = [one.save(2)]
        one.train(range(2, 4))
        return [*outcomes, one.save(4), one.save(4)]

    here, there = on_ranks(tmp_path / "run", work, keep=1), on_ranks(address, work, keep=1)
    assert [str(outcome.path) for outcome in there[0]] == [
        f"{address}/{name}" for name in ("step-00000002", "step-00000004", "step-00000004.1")
    ]
    assert [outcome.removed for outcome in here[1]] == [(), ("step-00000002",), ()]
    assert [outcome.removed for outcome in there[1]] == [(), ("step-00000002",), ()]
    assert {name.partition("/")[0] for name in address.files()} == {"step-00000004.1"}
    last = there[1][-1].path
    assert checksums(last) == checksums(tmp_path / "run" / "step-00000004")
    saved = checkpoint.open_checkpoint(last)
    assert checkpoint.damaged_files(saved) == []

    def resumed(world: Any, rank: int) -> dict:
        ranks = virtual_ranks(world, 1, rank)
        model = training.build(ranks, recompute=False)
        engine = PlainEngine(model, training.OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
        checkpoint.load(saved, engine, training.routers(model), ranks.dp)
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    [state] = run_virtual_ranks(1, resumed)  # another layout: one rank with all experts
    reader = checkpoint.CheckpointReader(checkpoint.open_checkpoint(tmp_path / "run" / "step-00000004"))
    name = next(name for name in saved.manifest["tensors"] if name in state)
    assert torch.equal(state[name].view(-1), reader.read(name, "weight", 0, state[name].numel()))

    for file, entry in saved.manifest["files"].items():
        path = ObjectStore.file(f"bucket/run/{last.name}/{file}")
        content = bytearray(path.read_bytes())
        content[entry["size"] // 2] ^= 1
        path.write_bytes(bytes(content))
    assert all("does not match its checksum" in line for line in checkpoint.damaged_files(saved))


def test_an_address_that_a_rank_cannot_write_to_or_that_is_another_for_it(
    address: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(operation: str, name: str) -> None:
        if operation == "open" and name.endswith("rank-00001.safetensors"):
            raise PermissionError("not your bucket")

    def lose(operation: str, name: str) -> None:
        if operation == "open" and name.endswith("manifest.json"):
            ObjectStore.file(name.replace("manifest.json", "rank-00001.safetensors")).unlink()

    def work(one: Rank) -> list[Outcome]:
        outcomes = [one.save(2)]
        for step, before in ((4, refuse), (6, lose)):
            one.ranks.dp.barrier()
            monkeypatch.setattr(ObjectStore, "before", staticmethod(before))
            outcomes.append(one.save(step))
        return outcomes

    told = on_ranks(address, work)
    errors = [[outcome.error for outcome in one] for one in told]
    assert errors[0] == errors[1]
    first, refused, lost = told[0]
    assert first.error == "" and "rank 1 could not write" in refused.error and "not your bucket" in refused.error
    assert "does not hold rank-00001.safetensors as written" in lost.error
    assert [path.name for path in committed(address)] == ["step-00000002"]
    assert {name.partition("/")[0] for name in address.files()} == {"step-00000002"}, "nothing is left of the others"
