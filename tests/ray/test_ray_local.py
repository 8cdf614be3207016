"""The private local Ray: its address, its token, its end."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster import ray_local
from cluster.process import descendants, is_alive
from cluster.ray_access import cluster_problem, dashboard_problems
from cluster.ray_actors import Connection
from cluster.ray_local import RayStartError, start_local

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def status(url, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def listening_addresses(pids):
    """The addresses on which these processes listen, from Linux's own tables."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(_address(fields[1].split(":")[0]))
    return found


def _address(text):
    if len(text) == 8:
        return socket.inet_ntop(socket.AF_INET, bytes.fromhex(text)[::-1])
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, 32, 8)]
    return socket.inet_ntop(socket.AF_INET6, b"".join(words))


def test_only_the_token_opens_the_dashboard(ray_cluster):
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        assert status(ray_cluster.address + path) == 401
        assert status(ray_cluster.address + path, "f" * 64) == 403
    assert status(ray_cluster.address + "/api/jobs/", ray_cluster.token) == 200


def test_a_cluster_that_asks_nobody_for_a_token_is_refused(ray_cluster, monkeypatch):
    assert cluster_problem(ray_cluster.gcs_address) == ""
    assert dashboard_problems(ray_cluster.address) == []
    settings = ray_local.ray_environment
    monkeypatch.setattr(ray_local, "ray_environment", lambda path: {**settings(path), "RAY_AUTH_MODE": "disabled"})
    with start_local(1) as cluster:
        [problem] = dashboard_problems(cluster.address)
        assert "takes jobs without a token (status 200)" in problem
        monkeypatch.setenv("RAY_ADDRESS", cluster.gcs_address)
        with pytest.raises(ConnectionError, match=r"asks nobody for a token.*--insecure"):
            Connection(None, ()).open(10.0)


def test_the_token_is_readable_by_its_user_only(ray_cluster):
    assert stat.S_IMODE(ray_cluster.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ray_cluster.session.stat().st_mode) == 0o700
    assert len(ray_cluster.token) == 64
    for pid in descendants(ray_cluster.guard_pid):
        assert ray_cluster.token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's socket tables")
def test_it_listens_on_loopback_only(ray_cluster):
    addresses = listening_addresses(descendants(ray_cluster.guard_pid))
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_two_clusters_do_not_meet_and_one_dies_with_its_owner(ray_cluster):
    program = (
        "import sys, time\n"
        "from cluster.ray_local import start_local\n"
        "cluster = start_local(1)\n"
        "print(cluster.guard_pid, cluster.session, cluster.address, flush=True)\n"
        "time.sleep(300)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    guard, session, address = owner.stdout.readline().split()
    assert address != ray_cluster.address
    assert status(f"{address}/api/version", ray_cluster.token) == 403
    everything = [int(guard), *descendants(int(guard))]
    assert len(everything) > 5
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 12
    while any(is_alive(pid) for pid in everything) or Path(session).exists():
        assert time.monotonic() < deadline, [pid for pid in everything if is_alive(pid)]
        time.sleep(0.05)
    assert ray_cluster.is_running()


def test_a_failed_start_shows_what_ray_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_local, "OBJECT_STORE_BYTES", 1)
    with pytest.raises(RayStartError, match=r"(?s)ended during its start.*object store"):
        start_local(1, temp_root="/tmp")


def test_a_start_that_takes_too_long_says_what_it_waited_for():
    before = set(Path("/tmp").glob("tt-*"))
    with pytest.raises(RayStartError, match=r"did not start within 0\.5 s"):
        start_local(1, start_timeout_s=0.5)
    assert set(Path("/tmp").glob("tt-*")) <= before
