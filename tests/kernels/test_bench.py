"""`trimtab bench kernels` on a CPU: every operation with its peers, what is absent and why, the record."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.bench_kernel_cases import OPERATIONS
from launch.cli import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--repeats", "2", "--tokens", "32", "--hidden", "32", "--width", "16", "--experts", "8", "--top-k", "2",
    "--vocab", "64", "--vocab-tokens", "8", "--vocab-hidden", "16",
]  # fmt: skip


@pytest.fixture
def threads():
    """The command sets the process's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_operation_is_measured_beside_its_peers(tmp_path, capsys, threads):
    assert main(["bench", "kernels", "--device", "cpu", *SMALL, "--out", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    record = json.loads(said[-1])
    assert record == json.loads((tmp_path / "kernels.json").read_text())
    rows = record["rows"]
    assert tuple(dict.fromkeys(row["op"] for row in rows)) == OPERATIONS
    for row in rows:
        assert 0 < row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["greatest"]
    experts = [row for row in rows if row["op"] == "experts_mlp"]
    assert {row["routing"] for row in experts} == {"natural", "even"}
    assert {row["backend"] for row in experts} == {"trimtab reference", "torch grouped_mm"}
    forward, both = (
        next(row for row in experts if row["pass"] == name) for name in ("forward", "forward and backward")
    )
    flops = 6 * 32 * 2 * 32 * 16
    assert forward["tflops"] * forward["seconds"]["median"] * 1e12 == pytest.approx(flops)
    assert both["tflops"] * both["seconds"]["median"] * 1e12 == pytest.approx(3 * flops)
    assert record["absent"].keys() == {"trimtab triton", "liger"}
    assert any("times the time of whole logits" in line for line in said)
    with (tmp_path / "kernels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_part_of_a_name_picks_operations_and_an_unknown_one_is_refused(tmp_path, capsys, threads):
    command = ["bench", "kernels", "--device", "cpu", *SMALL, "--out", str(tmp_path), "--only"]
    assert main([*command, "cross_entropy,rotate"]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {"linear_cross_entropy", "rotate"}
    capsys.readouterr()
    assert main([*command, "rotate,softmax"]) != 0
    assert "--only softmax: no such kernel; use experts_mlp" in capsys.readouterr().err


def test_it_needs_torch_and_numpy_only(tmp_path):
    """In a process where no other package of ours can be imported."""
    code = f"""
import sys
blocked = {{"ray", "deepspeed", "transformers", "pydantic", "matplotlib", "triton", "mpi4py", "tokenizers"}}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from launch.cli import main
sys.exit(main({["bench", "kernels", "--only", "rms_norm", *SMALL, "--out", str(tmp_path)]!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "kernels.csv").exists()
    assert not (tmp_path / "kernels.png").exists()
