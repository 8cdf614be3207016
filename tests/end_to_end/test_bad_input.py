"""Bad input is refused at once: exit status 2, one message with every problem, nothing started."""

from pathlib import Path

import pytest


def refused(done, *expected: str) -> None:
    """Exit status 2 and every expected phrase in one message."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    for phrase in expected:
        assert phrase in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", ["debug", "local", "ray"])
def test_everything_wrong_comes_in_one_message(trimtab, config: Path, tmp_path: Path, launcher: str) -> None:
    done = trimtab(
        "train", config, "train.stepz=3", "train.steps=many", "model.num_experts_per_tok=5",
        "data.path=/nowhere/at/all",
        "train.global_batch_size=7", "--launcher", launcher, "--run", tmp_path / "run",
        PYTHONPROFILEIMPORTTIME="1",
    )  # fmt: skip
    refused(
        done,
        "train.stepz is not a known key; did you mean `steps`?",
        'train.steps = "many" must be an integer',
        "model.num_experts_per_tok = 5 exceeds the 4 experts",
        "/nowhere/at/all",
        "train.global_batch_size = 7 is not a multiple",
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "launch.cli" in imported
    assert not imported & {"torch", "ray", "deepspeed"}, "refusing has to be quick: these take seconds to import"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.n_routed_experts=9", "model.n_group=1", "model.topk_group=1"], "n_routed_experts = 9 cannot be split"),
        (["cluster.workers=3", "train.global_batch_size=6"], "cannot be cut into groups of parallel.ep_size = 2"),
        (["model.vocab_size=200"], "model.vocab_size = 200 is smaller than the 257 tokens"),
        (["model.vocab_size=200", "train.precision=bf61"], 'did you mean \'bf16\'?'),
    ],
)  # fmt: skip
def test_single_mistakes(trimtab, config: Path, arguments: list[str], expected: str) -> None:
    refused(trimtab("train", config, *arguments), expected)


def test_more_workers_than_the_local_cluster_can_place(trimtab, config: Path) -> None:
    done = trimtab("submit", config, "cluster.workers=4096", "train.global_batch_size=8192", "data.lanes=4096")
    refused(done, "cluster.workers = 4096", "a local Ray cluster here has")


def test_data_folders(trimtab, config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(trimtab("train", config, f"data.path={tmp_path / 'empty'}"), "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not a dataset")
    refused(trimtab("train", config, f"data.path={tmp_path / 'other'}"), "manifest.json")


def test_run_folders(trimtab, config: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear run")
    refused(trimtab("train", config, "--run", tmp_path / "home"), "is not a run: it has no config.toml")
    for command in (["report"], ["compare"], ["generate"], ["checkpoint", "verify"], ["data", "audit"]):
        refused(trimtab(*command, tmp_path / "home"), "is not a run")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["letter.txt"]


def test_a_gpu_that_is_not_there(trimtab, config: Path) -> None:
    for launcher in ("debug", "local"):
        done = trimtab("train", config, "cluster.accelerator=gpu", "--launcher", launcher, CUDA_VISIBLE_DEVICES="")
        refused(done, 'cluster.accelerator = "gpu", but CUDA_VISIBLE_DEVICES hides every GPU')


def test_print_config_refuses_what_train_refuses(trimtab, config: Path) -> None:
    for wrong in ("optimizer.lr=nan", "train.global_batch_size=7", "cluster.workers=3", "faults.inject=kill@rank=9"):
        refused(trimtab("train", config, wrong, "--print-config"), wrong.partition("=")[0])


def test_sources(trimtab) -> None:
    refused(trimtab("train", "debgu"), "'debgu' is neither a preset (debug, laptop, v2-lite, v3-671b) nor a file")


def test_help_has_an_example_for_every_command(trimtab) -> None:
    for command in (["train"], ["submit"], ["generate"], ["report"], ["compare"], ["checkpoint", "verify"],
                    ["data", "pack"], ["data", "verify"], ["data", "audit"]):  # fmt: skip
        done = trimtab(*command, "--help")
        assert done.returncode == 0
        assert "example: trimtab " + " ".join(command) in done.stdout


def test_print_config_is_toml(trimtab, config: Path) -> None:
    import tomllib

    done = trimtab("train", config, "train.steps=11", "--print-config")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["train"]["steps"] == 11


def test_eval_names_every_mistake(trimtab, tmp_path: Path) -> None:
    done = trimtab(
        "eval", tmp_path / "no-run", "--window", "0", "--temperature", "-1", "--samples", "0", "--task-folder", tmp_path
    )
    refused(
        done, "is not a run", "--window = 0", "--temperature = -1", "--samples = 0", "--task-folder without --tasks"
    )
