"""Out and in again through the command line: training goes on as if nothing had happened, and from weights alone."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import events, metrics


def test_export_import_and_continue(trimtab, config: Path, tmp_path: Path) -> None:
    common = ["optimizer.schedule=constant", "checkpoint.every_steps=100", "--launcher", "debug", "--no-summary"]
    half = trimtab("train", config, "train.steps=2", *common, "--run", tmp_path / "run")
    assert half.returncode == 0, half.stderr
    out = trimtab("checkpoint", "export", tmp_path / "run", "--format", "hf", "--out", tmp_path / "hf",
                  "--with-optimizer", "--json")  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    assert json.loads(out.stdout.splitlines()[-1])["step"] == 2
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| parallel | " in card and "training loss, nats a token | " in card and "not recorded" not in card
    back = trimtab("checkpoint", "import", tmp_path / "hf", "--out", tmp_path / "back")
    assert back.returncode == 0 and "with the optimizer's state" in back.stdout, back.stdout + back.stderr

    for run in ("run", "back"):  # at another layout than the first steps
        more = ["train.steps=7", "parallel.virtual_ranks=2", *common, "--resume", "must", "--run", tmp_path / run]
        done = trimtab("train", tmp_path / run / "config.toml", *more)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, continued = metrics(tmp_path / "run")[2:], metrics(tmp_path / "back")
    assert [record["step"] for record in continued] == [3, 4, 5, 6, 7]
    for key in ("loss", "grad_norm", "lr", "tokens", "tokens_per_expert", "expert_bias"):
        assert [record[key] for record in continued] == [record[key] for record in whole], key


def test_weights_alone_train_on_from_step_0(trimtab, config: Path, tmp_path: Path) -> None:
    done = trimtab("train", config, "train.steps=1", "--launcher", "debug", "--no-summary", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert trimtab("checkpoint", "export", tmp_path / "run", "--out", tmp_path / "hf").returncode == 0
    again = trimtab("checkpoint", "export", tmp_path / "run", "--out", tmp_path / "hf")
    assert again.returncode == 2 and "is already there" in again.stderr
    back = trimtab("checkpoint", "import", tmp_path / "hf", "--out", tmp_path / "new", "--config", config,
                   "train.steps=2", "checkpoint.every_steps=1")  # fmt: skip
    assert back.returncode == 0 and "weights only" in back.stdout, back.stdout + back.stderr
    shutil.copytree(tmp_path / "new", tmp_path / "ranks")
    go = ["--resume", "must", "--no-summary", "--launcher"]
    on_ranks = [*go, "local", "cluster.workers=2", "parallel.ep_size=2", "parallel.zero_stage=3"]
    done = trimtab("train", tmp_path / "new" / "config.toml", *go, "debug", "--run", tmp_path / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in metrics(tmp_path / "new")] == [1, 2]
    sharded = trimtab("train", tmp_path / "ranks" / "config.toml", *on_ranks, "--run", tmp_path / "ranks")
    assert sharded.returncode == 0, sharded.stdout + sharded.stderr
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = [record[key] for record in metrics(tmp_path / "new")]
        assert [record[key] for record in metrics(tmp_path / "ranks")] == pytest.approx(expected, rel=tolerance), key
    assert events(tmp_path / "new")[0]["kind"] == "import"
    listed = trimtab("checkpoint", "list", tmp_path / "new")
    assert "weights only" not in listed.stdout.splitlines()[-1]
