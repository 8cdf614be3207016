"""Resuming through the command line: what may change is taken, what may not is refused by name, nothing is repeated."""

import json
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


def test_accepted_changes_are_carried_out_told_and_proven(trimtab, config: Path, half: Path, tmp_path: Path) -> None:
    base = ["train", config, "--launcher", "debug", "--run", half, "--no-summary", "optimizer.schedule=constant"]
    grown = trimtab(
        *base, "train.steps=5", "train.global_batch_size=16", "optimizer.lr=0.0005", "--accept-change",
        "train.global_batch_size",
    )  # fmt: skip
    assert grown.returncode == 0, grown.stderr
    assert "run: train.global_batch_size was 8 and is 16 from here on" in grown.stdout
    assert "the global batch size goes from 8 to 16 at step 4" in grown.stdout
    assert "to 0.0005 at step 4" in grown.stdout and "change at step 3: the rate goes from" in grown.stdout
    told = [event for event in events(half) if event["kind"] == "change"]
    assert told[0]["keys"]["optimizer.lr"]["new"] == 0.0005 and told[0]["keys"]["train.steps"] == {"old": 3, "new": 5}
    assert told[0]["accepted"] == ["train.global_batch_size"]
    audit = trimtab("data", "audit", half)
    assert audit.returncode == 0 and "5 steps, 56 sequences, each exactly once" in audit.stdout, audit.stdout
    again = trimtab(
        *base, "train.steps=7", "train.global_batch_size=16", "optimizer.lr=0.0005", "data.seq_len=16",
        "--accept-change", "data.seq_len", "parallel.virtual_ranks=2",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "another order of the data: data.seq_len was 32 and is 16" in again.stdout
    assert "the rate goes" not in again.stdout
    audit = trimtab("data", "audit", half)
    assert audit.returncode == 0, audit.stdout
    assert "of steps 1 to 5 was checked by itself" in audit.stdout and "of steps 6 to 7" in audit.stdout


def test_another_runs_place_for_checkpoints_is_refused(trimtab, config: Path, half: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (half / "checkpoints").iterdir())
    for resume in ("auto", "never"):
        done = trimtab(
            "train", config, "train.seed=7", f"checkpoint.dir={half / 'checkpoints'}", "--resume", resume,
            "--launcher", "debug", "--run", tmp_path / "other",
        )  # fmt: skip
        assert done.returncode == 2, done.stdout
        assert f"belongs to the run {half}" in done.stderr and str(tmp_path / "other") in done.stderr
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == before
    assert not (tmp_path / "other").exists()
    manifest = json.loads((half / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert manifest["run"]["id"] == json.loads((half / "identity.json").read_text())["id"]
