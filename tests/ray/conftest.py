"""One local Ray for all tests of this folder; at the end nothing of it may be left."""

from pathlib import Path

import pytest

from cluster import ray_local
from cluster.process import descendants


@pytest.fixture(scope="session")
def ray_cluster():
    """A running loopback cluster with room for two workers."""
    token_in_home = Path.home() / ".ray" / "auth_token"
    had_token = token_in_home.exists()
    cluster = ray_local.start_local(2)
    guard = cluster.guard_pid
    processes = descendants(guard)
    try:
        yield cluster
    finally:
        cluster.stop()
    assert not descendants(guard) and not cluster.session.exists()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert token_in_home.exists() == had_token
