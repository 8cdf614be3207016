"""Whole runs that have faults: every rank does the same, the state stays whole, and the events say what it was."""

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from cluster.flag import StopFlag
from data.audit import audit_run
from launch.config import CheckpointConfig, dump
from launch.guard import TrainingDivergedError
from launch.guard_config import GuardConfig
from launch.runfolder import RunFolder
from launch.session import Session, assemble
from launch.train import train
from model.slots import local_experts
from parallel.checkpoint import CheckpointError
from parallel.ranks import process_ranks
from parallel.replicas import ReplicaMismatchError
from tests.ranks.spawn import run_ranks
from tests.ranks.tiny import at_step, events, figures, play, saved_files, tiny

EXPERTS = "layers.1.mlp.experts.down_proj"
EACH = CheckpointConfig(every_steps=1, keep=0)


def poison(
    session: Session, *, rank: int, steps: range, by: float, name: str = EXPERTS, slot: int | None = 2,
    micro_step: int | None = None,
) -> None:  # fmt: skip
    """Multiplies one rank's own gradient of one parameter, or of one of its experts, in some steps (0-based)."""
    now, micro = [0], [0]
    begin = session.watch.begin

    def begin_micro_step(number: int) -> None:
        micro[0] = number
        begin(number)

    def begin_step(step: int) -> None:
        now[0] = step

    at_step(session, begin_step)
    session.watch.begin = begin_micro_step  # type: ignore[method-assign]

    # With experts on several ranks a hook of their weights is called twice: as the exchange's backward takes the
    # gradient, and as it hands it on.
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if now[0] not in steps or session.ranks.dp.rank != rank or micro_step not in (None, micro[0]):
            return gradient
        spoiled = gradient.clone()
        (spoiled if slot is None else spoiled[slot]).mul_(by)
        return spoiled

    dict(session.model.named_parameters())[name].register_hook(spoil)


def test_asynchronous_saves_are_those_that_everybody_waits_for(contract_data: Path, tmp_path: Path) -> None:
    for asynchronous in (True, False):
        checkpoint = CheckpointConfig(every_steps=1, keep=2, keep_every_steps=3, asynchronous=asynchronous)
        play(tiny(contract_data, steps=7, checkpoint=checkpoint), tmp_path / str(asynchronous))
    assert figures(tmp_path / "True") == figures(tmp_path / "False")
    assert list(saved_files(tmp_path / "True")) == [f"step-0000000{step}" for step in (3, 6, 7)]
    assert saved_files(tmp_path / "True") == saved_files(tmp_path / "False")
    for folder in (tmp_path / "True", tmp_path / "False"):
        assert [event["step"] for event in events(folder, "save")] == list(range(1, 8))


def test_a_resumed_run_is_the_undisturbed_one(contract_data: Path, tmp_path: Path) -> None:
    """Also in what it takes for a spike: that rests on steps from before the interruption."""

    def prepare(session: Session) -> None:
        poison(session, rank=1, steps=range(9, 10), by=1e4, name="norm.weight", slot=None)

    config = tiny(contract_data, steps=11, guard=GuardConfig(spike_window=16, drift_window=2))
    play(replace(config, train=replace(config.train, steps=6)), tmp_path / "parts", prepare=prepare)
    play(config, tmp_path / "parts", prepare=prepare)
    play(config, tmp_path / "whole", prepare=prepare)
    assert [event["step"] for event in events(tmp_path / "whole", "skip")] == [10]
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert saved_files(tmp_path / "parts") == saved_files(tmp_path / "whole")


def test_nan_in_one_gradient_skips_the_step_on_every_rank_and_is_named(contract_data: Path, tmp_path: Path) -> None:
    named: dict[int, int] = {}

    def prepare(session: Session) -> None:
        poison(session, rank=3, steps=range(2, 3), by=math.nan)
        named[session.ranks.dp.rank] = local_experts(session.model)[EXPERTS][2]

    config = tiny(contract_data, checkpoint=EACH)
    config = replace(config, train=replace(config.train, micro_batch_size=1))
    play(config, tmp_path, world_size=4, prepare=prepare)  # ranks 1 and 3 hold the same experts
    files = saved_files(tmp_path)
    assert files["step-00000003"] == files["step-00000002"], "weights, moments and bias are as they were, everywhere"
    assert files["step-00000004"] != files["step-00000003"]
    (skip,) = events(tmp_path, "skip")
    assert (skip["step"], skip["skip"], skip["rank"]) == (3, "non_finite", 3)
    assert (skip["layer"], skip["parameter"], skip["expert"]) == ("layers.1", EXPERTS, named[3])
    assert skip["ranks_affected"] == [3]
    assert f"first on rank 3 in layers.1: gradient of mlp.experts.down_proj, expert {named[3]}" in skip["cause"]
    assert skip["micro_step"] == 1 and len(skip["samples"]) == 1
    assert skip["documents"] and skip["documents"][0]["name"].endswith(".txt")
    assert skip["documents"][0]["shard"].endswith(".tar")
    assert {one["sequence"] for one in skip["documents"]} == set(skip["samples"])
    assert [record["step"] for record in figures(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_nan_in_the_forward_pass_is_named_by_its_first_tensor(contract_data: Path, tmp_path: Path) -> None:
    def prepare(session: Session) -> None:
        now = [0]
        at_step(session, lambda step: now.__setitem__(0, step))
        norm = session.model.get_submodule("layers.2.self_attn")

        def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if now[0] != 1 or session.ranks.dp.rank != 1:
                return None
            spoiled = output.clone()
            spoiled[0, 5] = math.nan
            return spoiled

        norm.register_forward_hook(spoil)

    play(tiny(contract_data, steps=3), tmp_path, prepare=prepare)
    (skip,) = events(tmp_path, "skip")
    assert (skip["step"], skip["rank"], skip["layer"], skip["tensor"]) == (2, 1, "layers.2", "self_attn output")
    assert skip["cause"].startswith("loss is nan and gradient norm is nan: first on rank 1 in layers.2")
    assert len(skip["samples"]) == 2


def test_nan_that_does_not_end_stops_the_run(contract_data: Path, tmp_path: Path) -> None:
    config = tiny(contract_data, guard=GuardConfig(max_skips=3))
    with pytest.raises(TrainingDivergedError, match="step 5: gradient norm is nan, for the 3rd step in a row"):
        play(config, tmp_path, prepare=lambda session: poison(session, rank=0, steps=range(2, 99), by=math.nan))
    assert [event["step"] for event in events(tmp_path, "skip")] == [3, 4, 5]
    assert all(event["samples"] for event in events(tmp_path, "skip"))
    assert list(saved_files(tmp_path)) == ["step-00000002", "step-00000004"]


def test_a_spike_is_skipped_with_its_samples(contract_data: Path, tmp_path: Path) -> None:
    config = tiny(contract_data, steps=12, checkpoint=EACH, guard=GuardConfig(spike_window=16))
    play(
        config, tmp_path,
        prepare=lambda session: poison(session, rank=1, steps=range(9, 10), by=1e4, name="norm.weight", slot=None),
    )  # fmt: skip
    (skip,) = events(tmp_path, "skip")
    assert (skip["step"], skip["skip"]) == (10, "spike")
    assert skip["cause"].startswith("gradient norm") and "is above" in skip["cause"]
    assert skip["n_samples"] == 8 and len(set(skip["samples"])) == 8
    assert len(skip["highest_losses"]) == 4 and skip["documents"]
    files = saved_files(tmp_path)
    assert files["step-00000010"] == files["step-00000009"] != files["step-00000011"]


def bad_data(session: Session, sequences: set[int]) -> None:
    """Gradients are wild whenever one of these sequences is in the global batch."""
    wild = [False]
    at_step(session, lambda step: wild.__setitem__(0, bool(sequences & set(session.stream.global_ids(step).tolist()))))
    session.model.norm.weight.register_hook(lambda gradient: gradient * (1e5 if wild[0] else 1.0))


def test_going_back_leaves_the_bad_data_out_for_good(contract_data: Path, tmp_path: Path) -> None:
    guard = GuardConfig(spike_window=16, max_spikes=2, rollback_steps=2)
    config = tiny(contract_data, steps=16, guard=guard)
    bad: set[int] = set()

    def prepare(session: Session) -> None:
        if not bad:
            bad.update(int(session.stream.global_ids(step)[3]) for step in (10, 11))
        session.ranks.dp.barrier()
        bad_data(session, bad)

    play(config, tmp_path / "whole", prepare=prepare)
    (back,) = events(tmp_path / "whole", "rollback")
    assert (back["step"], back["from_step"], back["first_skipped"]) == (8, 12, 11)
    assert back["skip_ranges"] == [[80, 96]]
    assert [record["step"] for record in figures(tmp_path / "whole")] == list(range(1, 17))
    assert [event["step"] for event in events(tmp_path / "whole", "skip")] == [11, 12], "none after it went back"
    RunFolder(tmp_path / "whole").create(dump(config))
    audit = audit_run(tmp_path / "whole")
    assert audit.ok and audit.n_skipped == 16, str(audit)

    shorter = replace(config, train=replace(config.train, steps=13))
    play(shorter, tmp_path / "parts", prepare=prepare)  # ends after it went back
    play(config, tmp_path / "parts", prepare=prepare)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert saved_files(tmp_path / "parts")["step-00000016"] == saved_files(tmp_path / "whole")["step-00000016"]


def test_a_run_that_keeps_going_back_stops(contract_data: Path, tmp_path: Path) -> None:
    guard = GuardConfig(max_skips=1, rollback_steps=1, max_rollbacks=2)
    config = tiny(contract_data, steps=9, guard=guard)
    with pytest.raises(TrainingDivergedError, match="after going back 2 times"):
        play(config, tmp_path, prepare=lambda session: poison(session, rank=0, steps=range(4, 99), by=math.nan))
    assert [event["step"] for event in events(tmp_path, "rollback")] == [2, 2]
    assert [event["skip_ranges"] for event in events(tmp_path, "rollback")] == [[[32, 40]], [[32, 48]]]


def full_disk(session: Session, steps: set[int]) -> None:
    """The disk of rank 1 is full whenever one of these steps is saved."""

    class Full:
        def save_hook(self, step: int) -> Any:
            def hook(point: str) -> None:
                if session.ranks.dp.rank == 1 and step in steps and point == "mid_write":
                    raise OSError(errno.ENOSPC, "No space left on device")

            return hook

        def at(self, *arguments: Any, **more: Any) -> None:
            """No drills."""

    session.faults = Full()  # type: ignore[assignment]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_an_alarm_and_training_goes_on(contract_data: Path, tmp_path: Path, asynchronous: bool) -> None:
    checkpoint = CheckpointConfig(every_steps=2, keep=0, asynchronous=asynchronous)
    config = tiny(contract_data, checkpoint=checkpoint)
    play(config, tmp_path / "full", prepare=lambda session: full_disk(session, {4}))
    play(config, tmp_path / "well")
    assert list(saved_files(tmp_path / "full")) == ["step-00000002", "step-00000006"]
    assert figures(tmp_path / "full") == figures(tmp_path / "well")
    assert saved_files(tmp_path / "full")["step-00000006"] == saved_files(tmp_path / "well")["step-00000006"]
    raised, ended = events(tmp_path / "full", "alarm")
    assert (raised["alarm"], raised["step"], raised["ended"]) == ("save_failed", 4, False)
    assert "rank 1 could not write" in raised["cause"] and "No space left" in raised["cause"]
    assert (ended["step"], ended["since"], ended["ended"]) == (6, 4, True)


def test_saves_that_go_on_failing_stop_the_run(contract_data: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(every_steps=1, keep=0, max_failed_saves=2)
    config = tiny(contract_data, checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"2 saves in a row have failed, the last at step 4: rank 1 could not"):
        play(config, tmp_path, prepare=lambda session: full_disk(session, {3, 4}))
    assert list(saved_files(tmp_path)) == ["step-00000001", "step-00000002"]


def test_the_last_save_must_not_fail(contract_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the run's last checkpoint, of step 6, was not saved"):
        play(tiny(contract_data), tmp_path, prepare=lambda session: full_disk(session, {6}))


@pytest.mark.parametrize(("name", "world_size"), [("layers.1.self_attn.o_proj.weight", 4), (EXPERTS, 6)])
def test_a_flipped_bit_is_found_in_the_rank_that_has_it(
    contract_data: Path, tmp_path: Path, name: str, world_size: int
) -> None:
    def prepare(session: Session) -> None:
        def flip(step: int) -> None:
            if step == 3 and session.ranks.dp.rank == 2:
                value = dict(session.model.named_parameters())[name].data.view(-1)[7:8]
                value.view(torch.int32).bitwise_xor_(1 << 12)  # the last bit may be lost again when a step is rounded

        at_step(session, flip)

    config = tiny(contract_data, guard=GuardConfig(check_replicas_every_steps=5))
    config = replace(config, checkpoint=CheckpointConfig(every_steps=100))
    config = replace(config, train=replace(config.train, micro_batch_size=1, global_batch_size=12))
    config = replace(config, train=replace(config.train, global_batch_size=12 if world_size == 6 else 8))
    with pytest.raises(ReplicaMismatchError, match=r"^rank 2 differs from most in") as caught:
        play(config, tmp_path, world_size=world_size, prepare=prepare)
    assert name in str(caught.value)
    assert len(figures(tmp_path)) == 5


def under_zero(rank: int, world_size: int, payload: dict) -> list[str]:
    """For each stage a run whose third step has NaN in rank 1's gradient of one expert, in the second micro-step."""
    ranks = process_ranks(2, 120)
    for stage in payload["stages"]:
        folder = Path(payload["folder"]) / str(stage)
        if rank == 0:
            RunFolder(folder).create("")
        ranks.dp.barrier()
        config = tiny(Path(payload["data"]), steps=4, checkpoint=EACH)
        config = replace(config, parallel=replace(config.parallel, zero_stage=stage))
        with patch("launch.train.peak_flops", lambda device, precision: (1.0, "not measured")):
            session = assemble(
                config, RunFolder(folder), ranks, torch.device("cpu"), StopFlag(), local_rank=rank, plain=False
            )
            poison(session, rank=1, steps=range(2, 3), by=math.nan, micro_step=1)
            train(session, session.resume("never", []))
            session.close()
            session.engine.close()  # type: ignore[attr-defined]
    return payload["stages"]


@pytest.mark.slow
def test_nan_under_zero(contract_data: Path, tmp_path: Path) -> None:
    payload = {"stages": [1, 2, 3], "folder": str(tmp_path), "data": str(contract_data)}
    for stage in run_ranks(2, "tests.ranks.test_survival:under_zero", payload)[0]:
        folder = tmp_path / str(stage)
        files = saved_files(folder)
        assert files["step-00000003"] == files["step-00000002"] != files["step-00000004"], f"stage {stage}"
        (skip,) = events(folder, "skip")
        found = {key: skip.get(key) for key in ("step", "rank", "parameter", "expert", "micro_step")}
        assert found == {"step": 3, "rank": 1, "parameter": EXPERTS, "expert": 6, "micro_step": 2}, f"stage {stage}"
