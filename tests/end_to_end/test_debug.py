"""Debug mode: one process, torch and numpy alone, a breakpoint anywhere, deterministic, names what is not finite."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, events, metrics

BARE = {"torch", "torchgen", "functorch", "numpy", "numpy.libs"}
OF_TORCH = {"typing_extensions.py", "sympy", "mpmath", "jinja2", "markupsafe", "networkx", "fsspec", "filelock",
            "setuptools", "_distutils_hack"}  # fmt: skip

START = """
import sys
from launch.cli import main
status = main(sys.argv[1:])
assert not {"ray", "deepspeed", "mpi4py", "rich", "tokenizers"} & {name.partition(".")[0] for name in sys.modules}
sys.exit(status)
"""


def test_runs_with_torch_and_numpy_alone(trimtab, config: Path, tmp_path: Path) -> None:
    import torch

    site = tmp_path / "site"
    site.mkdir()
    for name in BARE | OF_TORCH:
        found = Path(torch.__file__).parents[1] / name
        if found.exists():
            (site / name).symlink_to(found)
    (tmp_path / "start.py").write_text(START)
    run = tmp_path / "run"
    for arguments in (
        ["train", config, "parallel.virtual_ranks=2", "--launcher", "debug", "--run", run, "train.steps=3"],
        ["train", config, "parallel.virtual_ranks=2", "--launcher", "debug", "--run", run, "train.steps=5"],  # resumes
        ["generate", run, "--prompt", "def ", "--max-new-tokens", "4"],
        ["data", "audit", run],
        ["report", run],
        ["eval", run],
    ):
        # -S: without site-packages; what is linked above is all there is
        done = trimtab(
            *arguments,
            command=[sys.executable, "-S", str(tmp_path / "start.py")],
            PYTHONPATH=f"{ROOT}{os.pathsep}{site}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5]
    at_the_end = [event for event in events(run) if event["kind"] == "evaluation"][-1]
    measured = json.loads((run / "evaluations.jsonl").read_text())
    assert measured["step"] == 5 and measured["heldout"]["loss"] == at_the_end["heldout_loss"]
    assert measured["heldout"]["bits_per_byte"] == at_the_end["bits_per_byte"]
    missing = trimtab(
        "train", config, "--launcher", "local", "--run", tmp_path / "zero",
        command=[sys.executable, "-S", str(tmp_path / "start.py")], PYTHONPATH=f"{ROOT}{os.pathsep}{site}",
    )  # fmt: skip
    assert missing.returncode == 1
    assert "ZeRO needs DeepSpeed: run `make setup`, or use --launcher debug" in missing.stdout + missing.stderr


def test_is_deterministic(trimtab, config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = trimtab("train", config, "--launcher", "debug", "--run", tmp_path / name, "--no-summary")
        assert done.returncode == 0, done.stderr
    kept = ("loss", "grad_norm", "tokens_per_expert", "expert_bias")
    assert [[r[k] for k in kept] for r in metrics(tmp_path / "a")] == [
        [r[k] for k in kept] for r in metrics(tmp_path / "b")
    ]


POISONED = """
import torch
from launch.cli import main
from model.moe import Experts
real = Experts.each_row
calls = 0
def poisoned(self, rows, rows_per_expert, *weights):
    global calls
    calls += 1
    out = real(self, rows, rows_per_expert, *weights)
    if calls > 4:
        out = out.clone()
        out[rows_per_expert[0]] = float("nan")  # the first row of the second local expert
    return out
Experts.each_row = poisoned
raise SystemExit(main(__import__("sys").argv[1:]))
"""


def test_the_first_tensor_that_is_not_finite_is_named(trimtab, config: Path, tmp_path: Path) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    done = trimtab(
        "train", config, "--launcher", "debug", "--run", tmp_path / "run", "train.finite_checks=true",
        command=[sys.executable, str(tmp_path / "poisoned.py")],
    )  # fmt: skip
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "layers." in said and "expert 1" in said, said
    assert "in step 1, sample ids [" in said


PDB = """
import sys
from launch.cli import main
from parallel.exchange import AllToAllExchange
real = AllToAllExchange.run
stops = []
def run(self, x, *rest):
    if len(stops) < 2 and self.ep_rank not in stops:
        stops.append(self.ep_rank)
        breakpoint()
    return real(self, x, *rest)
AllToAllExchange.run = run
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_breakpoint_works_in_the_exchange_on_every_virtual_rank(config: Path, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "stops.py").write_text(PDB)
    terminal, ours = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stops.py"), "train", str(config), "parallel.virtual_ranks=2", "train.steps=1",
         "--launcher", "debug", "--run", str(tmp_path / "run"), "--no-summary"],
        stdin=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.write(terminal, b"p ('here', self.ep_rank, tuple(x.shape))\nc\np ('here', self.ep_rank, tuple(x.shape))\nc\n")
    said, _ = process.communicate(timeout=120)
    os.close(terminal)
    os.close(ours)
    assert process.returncode == 0, said
    assert "('here', 0, (64, 32))" in said, said
    assert "('here', 1, (64, 32))" in said, said
    assert "rank-0" in said and "rank-1" in said


STOPS = """
import sys
from launch.cli import main
from parallel.exchange import AllToAllExchange
real = AllToAllExchange.run
def run(self, x, *rest):
    breakpoint()
    return real(self, x, *rest)
AllToAllExchange.run = run
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_q_leaves_the_debugger_once_for_all_virtual_ranks(config: Path, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "stops.py").write_text(STOPS)
    terminal, ours = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stops.py"), "train", str(config), "parallel.virtual_ranks=2", "train.steps=1",
         "--launcher", "debug", "--run", str(tmp_path / "run"), "--no-summary"],
        stdin=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.write(terminal, b"q\n")
    said, _ = process.communicate(timeout=120)
    os.close(terminal)
    os.close(ours)
    assert process.returncode == 1, said
    assert said.count("(Pdb rank-") == 1 and "left in the debugger" in said and "Traceback" not in said, said
    start = next(event for event in events(tmp_path / "run") if event["kind"] == "start")
    assert f"model: {start['parameters']:,} parameters, {start['active_parameters']:,} of them active" in said
    assert start["versions"]["torch"] and start["hardware"]["cores"] >= 1 and start["date"].startswith("20")
