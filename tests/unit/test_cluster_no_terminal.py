"""A rank without a terminal says at once where `breakpoint()` works, instead of waiting for somebody to type."""

import sys
import time

import pytest

from cluster import local
from cluster.config import ClusterConfig
from cluster.no_terminal import NoTerminalError, without_terminal

ENTRY = "tests.ray.entries:stop_at_breakpoint"


def test_breakpoint_under_the_local_launcher_says_where_to_go(tmp_path) -> None:
    started = time.monotonic()
    result = local.run(ENTRY, {"answer": 1}, ClusterConfig(workers=2), log_dir=tmp_path)
    assert result.exit_code == 1 and time.monotonic() - started < 60
    assert "breakpoint() at " in result.error and "entries.py:" in result.error
    assert "use --launcher debug" in result.error
    assert all("NoTerminalError" in failure.exception for failure in result.failures)


def test_pdb_and_input_say_so_too() -> None:
    before = sys.stdin, sys.breakpointhook
    with without_terminal(3, "mpi"):
        with pytest.raises(NoTerminalError, match=r"rank 3 has no terminal under --launcher mpi"):
            input()
        with pytest.raises(NoTerminalError, match=r"breakpoint\(\) at .*test_cluster_no_terminal"):
            breakpoint()
    assert (sys.stdin, sys.breakpointhook) == before


def test_a_debugger_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    with without_terminal(0, "local"):
        breakpoint()
