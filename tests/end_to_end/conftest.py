"""A tiny dataset and configuration, and the command line as a user has it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRIMTAB = [sys.executable, "-m", "launch"]

CONFIG = """
preset = "debug"

[model]
vocab_size = 257
hidden_size = 32
num_hidden_layers = 3
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
intermediate_size = 64
moe_intermediate_size = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_group = 2
topk_group = 1

[data]
path = "{path}"
seq_len = 32

[train]
steps = 6
global_batch_size = 8
micro_batch_size = 2

[optimizer]
warmup_steps = 2

[checkpoint]
every_steps = 3

[telemetry]
console = "plain"
"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the project's own files, packed as bytes."""
    from data.pack import pack

    out = tmp_path_factory.mktemp("data") / "tiny"
    pack([str(ROOT / "parallel"), str(ROOT / "cluster")], out, tokenizer="bytes", heldout_kib=4)
    return out


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Path:
    """A configuration file for a run of six steps."""
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(path=dataset))
    return path


@pytest.fixture
def trimtab(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command in an empty folder; returns the finished process with its output."""

    def run(*arguments: object, timeout: float = 200, command: list[str] = TRIMTAB, **env: str):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return run


def metrics(run: Path) -> list[dict]:
    """The run's committed metrics."""
    from launch.runfolder import RunFolder, committed_metrics

    return committed_metrics(RunFolder(run))


def events(run: Path) -> list[dict]:
    """All events of a run."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
