"""Submitting to the local Ray as `trimtab submit` does, from end to end."""

import json
import threading
from pathlib import Path

import pytest

from cluster import jobs
from cluster.flag import StopFlag
from cluster.ray_local import start_local
from cluster.staging import stage

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job_dir(tmp_path_factory):
    return stage(ROOT, tmp_path_factory.mktemp("job"), folders=("cluster", "tests"), extra={"note.txt": "sent along\n"})


def submit(cluster, job_dir, *command, **options):
    shown = []
    code = jobs.submit(
        command, working_dir=job_dir, address=cluster.address, token=cluster.token, on_output=shown.append, **options
    )
    return code, "".join(shown)


def training(name, payload, log_dir, **spec):
    settings = {"workers": 2, "failure_grace_s": 1.0, **spec}
    argument = json.dumps([f"tests.ray.entries:{name}", payload, settings, str(log_dir), None, {}])
    return ["python", "-m", "tests.ray.drive", argument]


def test_a_job_runs_its_ranks_from_the_files_that_were_sent(ray_cluster, job_dir, tmp_path):
    code, log = submit(
        ray_cluster, job_dir, *training("describe", {}, tmp_path), submission_id="first-1", metadata={"a": "b"}
    )
    assert code == 0
    assert "rank 0 is here" in log and "trimtab job" not in log
    line = next(line for line in log.splitlines() if line.startswith("[0, "))
    assert [answer["world_size"] for answer in json.loads(line)[1]] == [2, 2]
    with pytest.raises(jobs.JobError, match="first-1"):
        submit(ray_cluster, job_dir, "true", submission_id="first-1")


def test_a_stopped_job_saves_and_returns_75(ray_cluster, job_dir, tmp_path):
    stop = StopFlag()
    shown = []

    def show(text):
        shown.append(text)
        if "rank 0 works" in text:
            stop.set()

    code = jobs.submit(
        training("work_until_stopped", {"saving": 4.0}, tmp_path),  # longer than Ray's own 3 s
        working_dir=job_dir,
        address=ray_cluster.address,
        token=ray_cluster.token,
        stop=stop,
        on_output=show,
        stop_grace_s=30.0,
    )
    assert code == 75
    assert "rank 0 has saved" in "".join(shown)


def test_the_status_and_the_files_come_along(ray_cluster, job_dir):
    program = "print(open('note.txt').read()); raise SystemExit(2)"
    code, log = submit(ray_cluster, job_dir, "python", "-c", program)
    assert code == 2 and "sent along" in log


def test_a_job_that_is_killed_is_a_failure(ray_cluster, job_dir, capsys):
    code, _ = submit(ray_cluster, job_dir, "python", "-c", "import os; os.kill(os.getpid(), 9)")
    assert code == 1 and "ended with status 137 (signal 9)" in capsys.readouterr().err


def test_the_token_is_wanted(ray_cluster, job_dir, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for token in (None, "f" * 64):
        with pytest.raises(jobs.JobError, match="wants its token; put it into RAY_AUTH_TOKEN"):
            jobs.submit(["true"], working_dir=job_dir, address=ray_cluster.address, token=token)


def test_nobody_at_the_address(job_dir):
    with pytest.raises(jobs.JobError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9"):
        jobs.submit(["true"], working_dir=job_dir, address="http://127.0.0.1:9")


def test_a_cluster_that_goes_away_is_a_failure_in_the_end(job_dir, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "HTTP_PATIENCE_S", 1.0)
    with start_local(1) as cluster:
        killed = threading.Thread(target=lambda: None)

        def show(text):
            nonlocal killed
            if "up" in text and not killed.ident:
                killed = threading.Thread(target=cluster.stop)
                killed.start()

        program = "import time; print('up', flush=True); time.sleep(100)"
        code = jobs.submit(
            ["python", "-c", program],
            working_dir=job_dir,
            address=cluster.address,
            token=cluster.token,
            on_output=show,
        )
        killed.join()
    assert code == 1 and "lost contact with the Ray cluster" in capsys.readouterr().err
