"""Runs the Triton cases where this machine can: interpreted in a process of their own, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.grouped_mm import grouped_linear
from kernels.rms_norm import rms_norm

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no package for this operating system"
)


def run_cases(**environment: str) -> None:
    """In a new process, since the interpreter is chosen when Triton is first imported."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=plain | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@needs_triton
def test_kernels_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_kernels_on_the_gpu():
    run_cases()


@needs_triton
def test_a_forced_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend triton cannot run on cpu"):
        grouped_linear(torch.zeros(4, 8), torch.zeros(2, 4, 8), (1, 3), "triton")
    with pytest.raises(ValueError, match="backend triton cannot run on cpu"):
        rms_norm(torch.zeros(4, 8), torch.zeros(8), backend="triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="use auto, reference or triton"):
        rms_norm(torch.zeros(4, 8), torch.zeros(8), backend="cuda")
