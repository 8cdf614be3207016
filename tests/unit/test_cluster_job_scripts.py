"""The ready scripts in launch/jobs parse, and call our commands and Ray's with options that exist."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "launch" / "jobs"
SCRIPTS = sorted([*JOBS.glob("*.sh"), *JOBS.glob("*.sbatch")])


@pytest.fixture
def stubs(tmp_path):
    """A folder of programs that only write their arguments down; returns what starts a script with them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("trimtab", "mpirun", "ray", "scontrol"):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >"{folder}/{name}.called"\n')
        stub.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)

    def run(script, *arguments, check=True, **environment):
        variables = {"TRIMTAB_BIN": str(folder), "HOME": str(tmp_path), "PATH": f"{folder}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", str(JOBS / script), *arguments],
            cwd=ROOT,
            env={**os.environ, **variables, **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=check,
        )

    def called(name):
        path = folder / f"{name}.called"
        return path.read_text().splitlines()[1:] if path.exists() else None

    run.called = called
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_all_four_ways_are_there():
    assert {path.name for path in JOBS.iterdir()} >= {
        "ray_cluster.sh",
        "kuberay.yaml",
        "slurm_mpirun.sbatch",
        "mpirun.sh",
    }


def test_mpirun_calls_train_with_options_that_exist(stubs):
    stubs("mpirun.sh", "4", "debug", "train.steps=5", "--run", "runs/x")
    ranks, program, *command = stubs.called("mpirun")[1:]
    assert ranks == "4" and program.endswith("/trimtab")
    options = build_parser().parse_args(command)
    assert (options.launcher, options.run, options.assignments) == ("mpi", "runs/x", ["train.steps=5"])


@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({}, "wheel"),
        ({"MPI4PY_LIBMPI": "/opt/mpi/libmpi.so"}, "site"),
        ({"LOADEDMODULES": "gcc/12:openmpi/5.0"}, "site"),
        ({"LOADEDMODULES": "gcc/12:cuda/12"}, "wheel"),
        ({"MPIRUN": "mpirun"}, "site"),
    ],
)
def test_the_sites_mpirun_is_taken_where_the_user_has_chosen_it(tmp_path, environment, taken):
    for name in ("wheel", "site"):
        (tmp_path / name).mkdir()
        stub = tmp_path / name / "mpirun"
        stub.write_text(f'#!/bin/sh\necho {name} "${{LD_LIBRARY_PATH:-none}}"\n')
        stub.chmod(0o755)
    left_out = ("MPI4PY_LIBMPI", "LOADEDMODULES", "MPIRUN")
    done = subprocess.run(
        ["bash", str(JOBS / "mpirun.sh"), "2", "debug"],
        env={
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "TRIMTAB_BIN": str(tmp_path / "wheel"),
            "PATH": f"{tmp_path / 'site'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": "/opt/site",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.split() == [taken, "none" if taken == "wheel" else "/opt/site"]


def test_mpirun_without_arguments_explains_itself(stubs):
    run = stubs("mpirun.sh", check=False)
    assert run.returncode == 2 and "mpirun.sh RANKS CONFIG" in run.stderr


def test_slurm_runs_one_rank_a_task(stubs):
    stubs("slurm_mpirun.sbatch", "debug", "--run", "runs/x", SLURM_NTASKS="16", SLURM_JOB_ID="7")
    assert stubs.called("mpirun")[:2] == ["-n", "16"]
    assert build_parser().parse_args(stubs.called("mpirun")[3:]).launcher == "mpi"
    assert stubs.called("scontrol") is None


def test_ray_cluster_needs_a_private_token(stubs, tmp_path):
    run = stubs("ray_cluster.sh", "head", check=False)
    assert run.returncode == 2 and "no token" in run.stderr and stubs.called("ray") is None
    stubs("ray_cluster.sh", "token")
    token = tmp_path / ".config" / "trimtab" / "ray-token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text().strip()) == 64
    assert stubs("ray_cluster.sh", "token", check=False).returncode == 2
    token.chmod(0o644)
    run = stubs("ray_cluster.sh", "head", check=False)
    assert run.returncode == 2 and "others can read" in run.stderr and stubs.called("ray") is None


def test_ray_cluster_calls_ray_and_submit_with_options_that_exist(stubs):
    from ray.scripts.scripts import start

    stubs("ray_cluster.sh", "token")
    stubs("ray_cluster.sh", "head", RAY_NODE_IP="10.0.0.1")
    head = start.make_context("start", stubs.called("ray")[1:]).params
    assert head["head"] and head["block"] and head["dashboard_host"] == "127.0.0.1"
    assert head["node_ip_address"] == "10.0.0.1"
    stubs("ray_cluster.sh", "worker", "10.0.0.1")
    worker = start.make_context("start", stubs.called("ray")[1:]).params
    assert worker["address"] == "10.0.0.1:6379" and not worker["head"]
    stubs("ray_cluster.sh", "submit", "debug", "train.steps=5")
    options = build_parser().parse_args(stubs.called("trimtab"))
    assert options.address == "http://127.0.0.1:8265"


def test_kuberay_manifest():
    import yaml

    from launch.config import read

    job = yaml.safe_load((JOBS / "kuberay.yaml").read_text())
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["authOptions"] == {"mode": "token"}
    python, module, name, *command = spec["entrypoint"].split()
    assert (python, module, name) == ("python", "-m", "launch")
    options = build_parser().parse_args(command)
    assert options.launcher == "ray"
    problems: list[str] = []
    config = read(options.config, options.assignments, problems)
    assert problems == [] and config.cluster.problems() == []
    [workers] = cluster["workerGroupSpecs"]
    assert workers["replicas"] == config.cluster.nodes
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus * config.cluster.nodes == config.cluster.workers
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    grace = float(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    pods = [cluster["headGroupSpec"], workers]
    patience = min(pod["template"]["spec"]["terminationGracePeriodSeconds"] for pod in pods)
    assert config.cluster.stop_grace_s < grace < patience
    leaving = workers["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    seconds = float(leaving.split("--seconds ")[1].split()[0])
    assert "python -m cluster.drain" in leaving and config.cluster.stop_grace_s < seconds < patience
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert f"ray job stop {spec['jobId']}" in head["lifecycle"]["preStop"]["exec"]["command"][-1]


STOPPABLE = """#!{python}
import signal, sys, time
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
print("works", flush=True)
end = time.monotonic() + 20
while time.monotonic() < end:
    time.sleep(0.02)
    if got:
        time.sleep(0.3)
        print("saved", flush=True)
        sys.exit(75)
"""


@pytest.mark.parametrize(
    ("script", "number", "requeued"),
    [
        ("mpirun.sh", signal.SIGINT, False),
        ("mpirun.sh", signal.SIGTERM, False),
        ("slurm_mpirun.sbatch", signal.SIGTERM, False),
        ("slurm_mpirun.sbatch", signal.SIGUSR1, True),
    ],
)
def test_a_signal_to_the_script_saves_and_ends_with_75(stubs, tmp_path, script, number, requeued):
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.write_text(STOPPABLE.format(python=sys.executable))
    arguments = ["2", "debug"] if script == "mpirun.sh" else ["debug"]
    environment = {"TRIMTAB_BIN": str(tmp_path / "bin"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(JOBS / script), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment, "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "works\n"
    time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert output == "saved\n"
    assert stubs.called("scontrol") == (["requeue", "7"] if requeued else None)


NODE = """#!{python}
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("ray ends", flush=True), sys.exit(0)))
print("works", flush=True)
time.sleep(20)
"""


def test_a_worker_that_is_ended_gives_notice_first(stubs, tmp_path):
    stubs("ray_cluster.sh", "token")
    ray = tmp_path / "bin" / "ray"
    ray.write_text(NODE.format(python=sys.executable))
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()[1]
    process = subprocess.Popen(
        ["bash", str(JOBS / "ray_cluster.sh"), "worker", "127.0.0.1"],
        cwd=tmp_path,
        env={**os.environ, "TRIMTAB_BIN": str(tmp_path / "bin"), "HOME": str(tmp_path), "RAY_HEAD_PORT": str(nobody)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "works\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert output == "ray ends\n" and process.returncode == 0
    assert "up to 90 s to save" in errors
    assert f"cluster.drain: the cluster at 127.0.0.1:{nobody} was not told" in errors


def test_every_script_gives_time_to_save():
    texts = {path.name: path.read_text() for path in JOBS.iterdir()}
    for name, text in texts.items():
        assert "TRIMTAB_STOP_GRACE_S" in text or "terminationGracePeriodSeconds" in text, name
    [warning] = [int(line.split("@")[1]) for line in texts["slurm_mpirun.sbatch"].splitlines() if "--signal=B:" in line]
    [grace] = [
        int(line.split("=")[1])
        for line in texts["slurm_mpirun.sbatch"].splitlines()
        if line.startswith("export TRIMTAB")
    ]
    assert 60 <= grace < warning
