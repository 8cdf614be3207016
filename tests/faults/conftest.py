"""A tiny dataset and configuration for drills, and what two runs must have in common to be one history."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.remote import RemotePath

ROOT = Path(__file__).resolve().parents[2]
TRIMTAB = [sys.executable, "-m", "launch"]

CONFIG = """
preset = "debug"

[model]
vocab_size = 257
hidden_size = 32
num_hidden_layers = 2
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
every_steps = 2

[cluster]
backoff_s = 0.0
failure_grace_s = 1.0
threads_per_worker = 1

[telemetry]
console = "plain"
heatmap_every_steps = 1000
"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the project's own files, packed as bytes."""
    from data.pack import pack

    out = tmp_path_factory.mktemp("data") / "tiny"
    pack([str(ROOT / "parallel")], out, tokenizer="bytes", heldout=0)
    return out


@pytest.fixture(scope="session")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file for a run of six steps on two ranks, saved every second step."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(CONFIG.format(path=dataset))
    return path


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault, on the local launcher."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(config, run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["kind"] for event in events(run) if event["kind"] in ("restart", "failure", "rewind")] == []
    return run


def start(config: Path, run: Path, *assignments: str, launcher: str = "local", **env: str) -> subprocess.Popen:
    """`trimtab train` in a session of its own."""
    command = [*TRIMTAB, "train", config, *assignments, "--launcher", launcher, "--run", run, "--no-summary"]
    return subprocess.Popen(
        [str(word) for word in command], cwd=run.parent, text=True, stdin=subprocess.DEVNULL, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def train(config: Path, run: Path, *assignments: str, launcher: str = "local", timeout: float = 150, **env: str):
    """`trimtab train` to its end; returns the finished process with its output."""
    process = start(config, run, *assignments, launcher=launcher, **env)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def events(run: Path, kind: str = "") -> list[dict]:
    """The events of a run, of one kind if one is given."""
    path = run / "events.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in told if kind in ("", event["kind"])]


def committed_steps(run: Path) -> list[int]:
    """Steps of the published checkpoints."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/COMMIT"))


def state_hash(root: Path | RemotePath, step: int) -> dict[str, str]:
    """The hash of everything that a checkpoint holds of weights, moments and biases, by tensor and kind."""
    import hashlib

    from parallel.checkpoint import CheckpointReader, open_checkpoint

    saved = open_checkpoint(root / f"step-{step:08d}")
    reader = CheckpointReader(saved)
    hashes = {}
    for name, entry in saved.manifest["tensors"].items():
        numel = 1
        for size in entry["shape"]:
            numel *= size
        for kind in entry["runs"]:
            values = reader.read(name, kind, 0, numel)
            hashes[f"{name}/{kind}"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return hashes


def assert_one_history(run: Path, other: Path, step: int = 6, checkpoints: RemotePath | None = None) -> None:
    """Both runs have the same committed metrics and ledger, and the same state after `step` steps, bit for bit.

    checkpoints: where those of `run` lie, if not in its folder.
    """
    from launch.runfolder import RunFolder, committed_ledger, committed_metrics

    mine, theirs = committed_metrics(RunFolder(run)), committed_metrics(RunFolder(other))
    assert [record["step"] for record in mine] == list(range(1, step + 1))
    for key in ("loss", "mtp_loss", "grad_norm", "tokens_per_expert", "expert_bias", "tokens", "lr"):
        assert [record[key] for record in mine] == [record[key] for record in theirs], key
    assert committed_ledger(RunFolder(run)) == committed_ledger(RunFolder(other))
    hashes = state_hash(checkpoints or run / "checkpoints", step)
    assert hashes and hashes == state_hash(other / "checkpoints", step)
