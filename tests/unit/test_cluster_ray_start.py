"""What is settled before Ray starts or is joined: addresses, versions, folders, the interpreter of a job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import ray_local
from cluster.config import ClusterConfig
from cluster.ray_access import address_problem, gcs_address_problem
from cluster.ray_actors import version_problem
from cluster.ray_capacity import bundles_of
from cluster.ray_gang import unshared_problem
from cluster.ray_local import RayStartError
from cluster.ray_python import python_of
from cluster.ray_rank import folder_problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.1:6379", "head.example.org:6379", "[::1]:6379"])
def test_addresses_that_a_driver_can_join(address):
    assert gcs_address_problem(address) == ""


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://head:8265", "a dashboard, which takes jobs: use `trimtab submit CONFIG --address http://head:8265`"),
        ("https://head", "RAY_ADDRESS=head:6379"),
        ("ray://head:10001", "the Ray client's server, which cannot place ranks; give RAY_ADDRESS=head:6379"),
        ("anyscale://x", "of an unknown kind; give RAY_ADDRESS=HEAD:6379"),
        ("local", "--launcher local"),
        ("head", "no port; give RAY_ADDRESS=head:6379"),
        ("::1", "no port"),
        ("head:", "is not a port"),
        ("head:http", "'http' is not a port"),
        ("head:99999", "from 1 to 65535"),
    ],
)
def test_other_addresses_are_refused_with_what_to_give(address, said):
    assert said in gcs_address_problem(address)


@pytest.mark.parametrize(
    "address",
    ["auto", "head", "head:8265", "ray://head:10001", "http://", "http://head:port", "http://[::1", "http://h:0?x=1"],
)
def test_what_is_no_dashboard(address):
    [problem] = address_problem(address)
    assert "not the address of a Ray dashboard" in problem and "http://127.0.0.1:8265" in problem


def test_a_login_in_the_address_is_refused_and_not_repeated():
    [problem] = address_problem("http://me:hidden-word@127.0.0.1:8265")
    assert "hidden-word" not in problem and "RAY_AUTH_TOKEN_PATH" in problem
    assert address_problem("https://ray.example.org/team-a/") == ()


def test_a_version_that_does_not_fit_is_told_with_both():
    text = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.55.1\n    Python: 3.11.7\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    problem = version_problem(text, "10.0.0.1:6379")
    assert "runs Ray 2.55.1 on Python 3.11.7" in problem and "Ray 2.60.0 on Python 3.11.7" in problem
    assert "install ray==2.55.1 here, or start the cluster again with Ray 2.60.0" in problem
    assert "one Python" not in problem
    assert "one Python, 3.12.1 or 3.11.7" in version_problem(text.replace("3.11.7", "3.12.1", 1), "x:1")


def test_the_session_goes_where_it_can(tmp_path, monkeypatch):
    """A file stands for a folder that cannot be written: root may write everywhere else."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    short = Path("/tmp") / f"s{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setattr(ray_local, "TEMP_ROOTS", (str(nowhere), str(short)))
        monkeypatch.setattr(ray_local, "LONGEST_ROOT", 60)
        monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
        session = ray_local._session_folder(None)
        assert session.parent == short.resolve() and session.stat().st_mode & 0o777 == 0o700
        session.rmdir()
        monkeypatch.setenv("TMPDIR", str(short))
        session = ray_local._session_folder(None)
        assert session.parent == short.resolve()
        session.rmdir()
    finally:
        short.rmdir()
    monkeypatch.setattr(ray_local, "TEMP_ROOTS", ("/dev/null",))
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(
        RayStartError, match=r"TMPDIR = .* is longer than the 60 characters.*/dev/null: Not a directory"
    ):
        ray_local.start_local(1)


def test_a_folder_of_the_driver_is_looked_for_on_a_worker(tmp_path):
    (tmp_path / "proof").touch()
    assert folder_problem(tmp_path / "proof") == ""
    assert folder_problem(tmp_path / "elsewhere" / "proof") == "does not see {folder}"
    missing, seen = ["", "does not see {folder}"], ["", ""]
    places = [{"address": "10.0.0.1", "missing": seen}, {"address": "10.0.0.2", "missing": missing}]
    problem = unshared_problem([Path("/runs/x/checkpoints")], places)
    assert problem.startswith("the node 10.0.0.2 does not see /runs/x/checkpoints: the driver on ")
    assert "storage that all nodes see" in problem and "checkpoint.dir" in problem and "10.0.0.1" not in problem
    assert unshared_problem([Path("/runs")], places[:1]) == ""
    assert unshared_problem([], [{"address": "a", "missing": ["does not see {folder}"]}]) == "", "logs come home anyway"


def test_bundles():
    spread = ClusterConfig(workers=8, nodes=2, cpus_per_worker=3)
    assert bundles_of(spread, 8, True) == ([{"CPU": 12, "GPU": 4}] * 2, "STRICT_SPREAD")
    assert bundles_of(spread, 4, False) == ([{"CPU": 12}], "STRICT_SPREAD")
    assert bundles_of(spread, 3, False) == ([{"CPU": 3}] * 3, "PACK")
    assert bundles_of(ClusterConfig(workers=2), 2, False) == ([{"CPU": 1}] * 2, "PACK")


def test_the_interpreter_of_a_process_that_has_loaded_ray():
    line = "7f00-7f01 r-xp 00000000 08:01 123   /opt/a venv/lib/python3.11/site-packages/ray/_raylet.so\n"
    assert python_of("7f00-7f01 rw-p 0 00:00 0 [heap]\n" + line) == "/opt/a venv/bin/python"
    assert python_of("7f00-7f01 r-xp 0 08:01 1 /usr/lib/libc.so.6\n") == ""


def test_a_job_runs_the_python_of_the_process_above_it(tmp_path):
    """A parent that has loaded Ray, and a foreign python first on PATH; without such a parent, PATH decides."""
    foreign = tmp_path / "python"
    foreign.write_text('#!/bin/sh\necho foreign "$@"\n')
    foreign.chmod(0o755)
    job = 'print(__import__("sys").executable)'
    program = (
        "import subprocess, sys\n{load}"
        f"print(subprocess.run(['sh', 'cluster/job_main.sh', 'python', '-c', '''{job}'''], "
        "capture_output=True, text=True).stdout)"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for load, wanted in (("import ray._raylet\n", sys.executable), ("", "foreign -m cluster.job_main")):
        run = subprocess.run(
            [sys.executable, "-c", program.format(load=load)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert wanted in run.stdout, run.stdout + run.stderr
