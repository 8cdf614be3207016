"""Resuming through the command line: what may change is taken, what may not is refused by name, nothing is repeated."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import events, metrics


@pytest.fixture
def half(trimtab, config: Path, tmp_path: Path) -> Path:
    """A run that has three of its six steps."""
    done = trimtab("train", config, "train.steps=3", "optimizer.schedule=constant", "--launcher", "debug", "--run",
                   tmp_path / "run", "--no-summary")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_five_plus_five_is_ten(trimtab, config: Path, tmp_path: Path, half: Path) -> None:
    common = ["optimizer.schedule=constant", "--launcher", "debug", "--no-summary"]
    again = trimtab("train", config, *common, "--run", half)
    whole = trimtab("train", config, *common, "--run", tmp_path / "whole")
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    for key in ("loss", "grad_norm", "tokens_per_expert", "expert_bias", "tokens"):
        assert [r[key] for r in metrics(half)] == [r[key] for r in metrics(tmp_path / "whole")], key
    audit = trimtab("data", "audit", half)
    assert audit.returncode == 0, audit.stdout
    assert "6 steps, 48 sequences, each exactly once" in audit.stdout


def test_another_layout_continues(trimtab, config: Path, half: Path) -> None:
    done = trimtab("train", config, "optimizer.schedule=constant", "parallel.virtual_ranks=2", "--launcher", "debug",
                   "--run", half, "--no-summary")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [record["world_size"] for record in metrics(half)] == [1, 1, 1, 2, 2, 2]
    assert [event["world_size"] for event in events(half) if event["kind"] == "start"] == [1, 2]


def test_changes_of_model_data_batch_and_seed_are_refused_by_key(trimtab, config: Path, half: Path) -> None:
    done = trimtab("train", config, "model.hidden_size=48", "data.seed=9", "train.global_batch_size=16", "--launcher",
                   "debug", "--run", half)  # fmt: skip
    assert done.returncode == 2
    for key in ("model.hidden_size", "data.seed", "train.global_batch_size"):
        assert f"{key} = " in done.stderr
        assert f"--accept-change {key}" in done.stderr


def test_another_dataset_is_refused_by_its_fingerprint(trimtab, config: Path, half: Path, tmp_path: Path) -> None:
    from data.pack import pack

    (tmp_path / "text.txt").write_text("another text\n" * 500)
    pack([str(tmp_path / "text.txt")], tmp_path / "other", tokenizer="bytes", heldout=0)
    command = ["train", config, f"data.path={tmp_path / 'other'}", "--launcher", "debug", "--run", half, "--no-summary"]
    done = trimtab(*command)
    assert done.returncode == 2
    assert "holds another dataset" in done.stderr
    assert trimtab(*command, "--accept-change", "data.path").returncode == 0


def test_modes(trimtab, config: Path, half: Path, tmp_path: Path) -> None:
    never = trimtab("train", config, "--launcher", "debug", "--run", half, "--resume", "never")
    assert never.returncode == 2
    assert "already has the checkpoint step-00000003" in never.stderr
    must = trimtab("train", config, "--launcher", "debug", "--run", tmp_path / "new", "--resume", "must")
    assert must.returncode == 2
    assert "has no committed checkpoint" in must.stderr


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(trimtab, config: Path, half: Path) -> None:
    command = ["train", config, "optimizer.schedule=constant", "--launcher", "debug", "--run", half, "--no-summary"]
    assert trimtab(*command).returncode == 0
    victim = half / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    verify = trimtab("checkpoint", "verify", half)
    assert verify.returncode == 1
    assert "step-00000006/rank-00000.safetensors does not match its checksum" in verify.stdout
    done = trimtab(*command, "train.steps=8")
    assert done.returncode == 0, done.stderr
    assert "checkpoint not readable" in done.stdout
    assert "resume at step 3" in done.stdout
    assert [record["step"] for record in metrics(half)] == list(range(1, 9))
    assert trimtab("data", "audit", half).returncode == 0


def test_a_finished_run_is_shown_again_at_once(trimtab, config: Path, half: Path) -> None:
    done = trimtab(
        "train", config, "train.steps=3", "optimizer.schedule=constant", "--launcher", "debug", "--run", half
    )
    assert done.returncode == 0
    assert "is complete (3 steps), nothing is trained" in done.stdout
    assert len([event for event in events(half) if event["kind"] == "start"]) == 1
