"""Stopping on request: a committed checkpoint, nothing left running, exit status 75, and the next start goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.process import descendants
from tests.end_to_end.conftest import ROOT, TRIMTAB, events, metrics


def started(config: Path, run: Path, *arguments: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts a long run as a session of its own and returns once it has done a step."""
    process = subprocess.Popen(
        [*TRIMTAB, *arguments, str(config), "train.steps=100000", "checkpoint.every_steps=50000", "--run", str(run),
         *more],
        cwd=run.parent, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step within 90 s"
        time.sleep(0.2)
    return process


def stopped_and_resumable(process: subprocess.Popen, run: Path, trimtab, again: list[str], config: Path) -> None:
    """Waits for the end; checks status, checkpoint, events, and that the same command goes on."""
    children = descendants(process.pid)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said
    assert "committed checkpoint" in said
    deadline = time.monotonic() + 10
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)
    (checkpoint,) = [path for path in (run / "checkpoints").iterdir() if (path / "COMMIT").exists()]
    step = int(checkpoint.name.removeprefix("step-"))
    *_, end, account = events(run)
    assert [event["kind"] for event in events(run)][-3:] == ["stop", "end", "accounting"]
    assert (end["cause"], end["exit_status"], account["launches"]) == ("stopped", 75, 1)
    done = trimtab(*again, config, f"train.steps={step + 2}", "--run", run, "--no-summary")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resume at step {step}" in done.stdout
    assert [record["step"] for record in metrics(run)] == list(range(1, step + 3))
    account = events(run)[-1]  # of both launches: a stop on request costs no step, and is no fault
    assert (account["launches"], account["generations"], account["steps"]) == (2, 2, step + 2)
    assert (account["lost_steps"], account["lost_seconds"], account["interruptions"]) == (0, 0.0, {})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local(config: Path, tmp_path: Path, trimtab, number: int) -> None:
    process = started(config, tmp_path / "run", "train", "--launcher", "local")
    process.send_signal(number)
    stopped_and_resumable(process, tmp_path / "run", trimtab, ["train", "--launcher", "local"], config)


@pytest.mark.slow
def test_debug(config: Path, tmp_path: Path, trimtab) -> None:
    arguments = ["train", "--launcher", "debug"]
    process = started(config, tmp_path / "run", *arguments, more=("parallel.virtual_ranks=2",))
    process.send_signal(signal.SIGINT)
    stopped_and_resumable(process, tmp_path / "run", trimtab, arguments, config)


@pytest.mark.slow
@pytest.mark.ray
def test_submit_with_its_own_ray(config: Path, tmp_path: Path, trimtab) -> None:
    process = started(config, tmp_path / "run", "submit")
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    stopped_and_resumable(process, tmp_path / "run", trimtab, ["submit"], config)
