"""Cores and threads: bindings, control groups, and what the user's environment says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cores import quota_cores, share_of_node, stated_threads, usable_cores
from cluster.entry import thread_count

ROOT = Path(__file__).resolve().parents[2]


def group(tmp_path: Path, lines: str, files: dict[str, str]) -> int | None:
    (tmp_path / "cgroup").write_text(lines)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return quota_cores(tmp_path / "cgroup", tmp_path / "fs")


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.max": "150000 100000"}, 2),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "400000 100000"}, 4),
        ("0::/elsewhere/box\n", {"cpu.max": "50000 100000"}, 1),  # a container that sees its group as the root
        ("0::/../box\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/box\n0::/\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu,cpuacct:/box\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/box\n", {"cpuset/box/cpu.cfs_quota_us": "100000"}, None),
    ],
)
def test_quota_of_both_versions(tmp_path: Path, lines: str, files: dict[str, str], cores: int | None) -> None:
    assert group(tmp_path, lines, files) == cores


def test_no_control_groups(tmp_path: Path) -> None:
    assert quota_cores(tmp_path / "none", tmp_path) is None
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_bound_ranks_keep_their_cores_and_shared_ones_are_divided() -> None:
    first, second = set(range(8)), set(range(8, 16))
    assert share_of_node(first, [first, second], None) == 8
    assert share_of_node(first, [first, first], None) == 4
    assert share_of_node(first | second, [first | second] * 4, None) == 4
    assert share_of_node({0, 1}, [{0, 1}, first], None) == 2, "never more than this rank's own cores"
    assert share_of_node(first, [first, second], quota=4) == 2
    assert share_of_node({0}, [{0}] * 3, quota=1) == 1


def test_the_users_number_wins_over_a_share_and_the_configuration_over_both() -> None:
    assert stated_threads({"OMP_NUM_THREADS": "6"}) == 6 == stated_threads({"OMP_NUM_THREADS": " 6,2"})
    assert stated_threads({}) is stated_threads({"OMP_NUM_THREADS": "many"}) is stated_threads({"OMP_NUM_THREADS": "0"})
    assert thread_count(0, 64, 6) == 6
    assert thread_count(3, 64, 6) == 3
    assert thread_count(0, 10_000) == 1


def test_debug_mode_heeds_the_configured_threads() -> None:
    import torch

    from cluster import debug

    before = torch.get_num_threads()
    result = debug.run("tests.unit.test_cluster_cores:threads", {}, threads_per_worker=3)
    assert result.results == [{"threads": 3}]
    assert torch.get_num_threads() == before


def threads(context: object, payload: dict) -> dict:
    import torch

    return {"threads": torch.get_num_threads()}


def test_names_of_ours_and_of_python_in_the_users_folder(tmp_path: Path) -> None:
    for name in ("random.py", "queue.py", "cluster.py", "monitor.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from cluster import local; from cluster.config import ClusterConfig\n"
        "r = local.run('tests.ray.entries:describe', {}, ClusterConfig(workers=1), log_dir=Path('logs'))\n"
        "print(r.error); sys.exit(r.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_local_launcher_refuses_what_would_stop_the_machine() -> None:
    from dataclasses import replace

    from launch.config import Config
    from launch.devices import local_process_problems

    config = Config()
    many = replace(config, cluster=replace(config.cluster, workers=100_000))
    [problem] = local_process_problems(many)
    assert "cluster.workers = 100000" in problem and "--launcher ray or mpi" in problem
    assert local_process_problems(config) == []
