"""The commands that README.md and docs/ print run: in tiny forms, one after the other, in a folder with a finished run.

A command is run, or it stands in NOT_RUN with the reason. Long ones get overrides behind them. What only mpirun, Ray or
several processes can run is left to `make drill`, and its configuration is checked by tests/unit/test_docs_commands.py.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data.pack import pack
from launch.cli import main
from tests.end_to_end.docs_commands import ROOT, Printed, printed, without_placeholders

TINY = [
    "model.vocab_size=600", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.q_lora_rank=16", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8",
    "model.v_head_dim=8", "model.intermediate_size=64", "model.moe_intermediate_size=16", "model.n_routed_experts=8",
    "model.num_experts_per_tok=2", "model.n_group=2", "model.topk_group=1", "data.seq_len=32", "train.steps=2",
    "checkpoint.every_steps=1", "telemetry.console=plain",
]  # fmt: skip
NOT_RUN = {
    r"make (train|test|setup|check|drill)": "the whole project's own shortcuts, which run elsewhere",
    r"\S*tensorboard ": "a server that runs until it is stopped",
    r"trimtab submit|\S*ray_cluster\.sh|ray |kubectl|sbatch|srun": "needs a cluster; tests/ray has one",
    r"\S*mpirun": "needs MPI; tests/end_to_end/test_launchers.py has it",
    r"trimtab train laptop": "half a billion parameters and a GPU",
    r"trimtab train .*stepz": "a sample of errors, compared in tests/unit/test_docs_commands.py",
    r"trimtab train .*--launcher local": "several processes; run by the drill below",
    r"trimtab train .*data\.path=SHORT": "a packed corpus of the reader's own",
    r"trimtab bench": "minutes; each benchmark has a test of its own in a small form",
    r"trimtab eval .*(--tasks|--humaneval)": "needs a package that is not installed",
    r"trimtab checkpoint import|trimtab train runs/new": "tests/end_to_end/test_huggingface.py brings an export back",
    r"trimtab generate .*runs/small": "a second run; tests/end_to_end/test_generate.py has it",
    r"trimtab compare runs/curve": "runs of the reader's own",
    r"python -m pytest|python -m cluster\.|\S*pip |export |for |done|docker|lm_eval|source ": "not our command",
}


def reason(one: Printed) -> str:
    """Why a command is not run here; empty for one that is."""
    text = re.sub(r"^\S*\.venv/bin/", "", " ".join(one.words))
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, text)), "")


RUN = list({one.words: one for one in printed() if one.block and not reason(one)}.values())  # each once


def small(one: Printed) -> list[str]:
    """A printed command in a form that takes a second."""
    words = [word.replace("$p", "load") for word in without_placeholders(one.trimtab)]
    words = [os.path.expanduser(re.sub(r"(?<==)~", os.path.expanduser("~"), word)) for word in words]
    if words[0] == "train":
        words = [word for word in words if not word.startswith("model.vocab_size=")] + TINY
        words += [] if "--launcher" in words else ["--launcher", "debug"]
        words += [] if "--no-summary" in words else ["--no-summary"]
    if words[0] == "generate":
        words += ["--max-new-tokens", "4"]
    return [re.sub(r"bpe:\d+", "bpe:300", word) for word in words]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with notes, code and a corpus, datasets/python and the finished runs that pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("notes", "code", "code/project", "corpus"):
        (folder / name).mkdir(exist_ok=True)
        for number in range(8):
            (folder / name / f"{number}.txt").write_text(f"{name} {number}: words of a text, some of them twice. " * 40)
    pack([str(ROOT / "cluster" / "config.py"), str(ROOT / "cluster" / "local.py"), str(ROOT / "cluster" / "flag.py")],
         folder / "datasets" / "python", tokenizer="bytes", heldout_kib=1)  # fmt: skip
    (folder / "prompts.txt").write_text("import \ndef \n")
    (folder / "tokenizer.json").write_text("{}")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("debug", "debug-no-bias"):
            assert main(["train", "debug", *TINY, "--launcher", "debug", "--no-summary", "--run", f"runs/{name}"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_commands_are_run() -> None:
    assert len(RUN) > 20, [str(one) for one in RUN]
    assert all(one.trimtab for one in RUN), [str(one) for one in RUN if not one.trimtab]


@pytest.mark.parametrize("page", sorted({one.page for one in RUN}))
def test_the_commands_of_a_page_run(
    page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace))
    for one in RUN:
        if one.page == page:
            shutil.rmtree("exported", ignore_errors=True)
            if one.trimtab[:2] == ("data", "pack"):
                shutil.rmtree("datasets/mine", ignore_errors=True)
            status = main(small(one))
            said = capsys.readouterr()
            assert status == 0, f"{one}\n{said.out[-2000:]}\n{said.err[-2000:]}"


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize("one", [one for one in printed() if one.block and "local" in one.words], ids=str)
def test_commands_of_several_processes_run(one: Printed, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "stepz" in str(one) or "laptop" in one.words:
        pytest.skip("not a command that trains here")
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace))
    assert main(small(one)) == 0


def test_json_of_every_command_is_one_object_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    for words in (
        ["train", "debug", *TINY, "--launcher", "debug", "--run", "runs/debug"],
        ["report", "runs/debug"],
        ["compare", "runs/debug", "runs/debug-no-bias"],
        ["runs", "runs"],
        ["checkpoint", "list", "runs/debug"],
        ["checkpoint", "verify", "runs/debug"],
        ["checkpoint", "prune", "runs/debug", "--keep", "1", "--dry-run"],
        ["checkpoint", "export", "runs/debug", "--out", "exported-json"],
        ["data", "pack", "notes", "--out", "datasets/json", "--tokenizer", "bytes"],
        ["data", "verify", "datasets/python"],
        ["data", "audit", "runs/debug"],
        ["generate", "runs/debug", "--prompt", "a", "--max-new-tokens", "2", "--step", "1"],
        ["eval", "runs/debug"],
    ):
        assert main([*words, "--json"]) == 0, words
        said = capsys.readouterr()
        assert said.out.count("\n") == 1 and isinstance(json.loads(said.out), dict), (words, said.out)


def test_a_complete_run_names_the_keys_that_it_did_not_use(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    changed = ["balance.alarm_max_vio=1", "faults.inject=kill@step=2", "--launcher", "debug", "--run", "runs/debug"]
    assert main(["train", "debug", *TINY, *changed]) == 0
    said = capsys.readouterr().out
    assert "nothing is trained" in said
    assert "differ from the run's and were not used: balance.alarm_max_vio, faults.inject" in said
