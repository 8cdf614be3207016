"""A private Ray on this machine: loopback only, with its own token, gone when its owner is gone."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cluster.entry import FOREIGN_PREFIXES
from cluster.logs import last_lines
from cluster.ports import free_ports
from cluster.ray_guard import MARK_NAME
from cluster.web_proxies import without_proxies

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of size passes through it; Ray's minimum is 75 MiB
NOBODY = "http://127.0.0.1:9/"  # a head whose reports on its use are off reports just that, to the internet
ATTEMPTS = 3
TEMP_ROOTS = ("/tmp", "/var/tmp", "/dev/shm")  # after TMPDIR
# Ray's sockets lie about 82 characters below this folder, and Linux allows 107 in all.
LONGEST_ROOT = 24
ROOT = str(Path(__file__).resolve().parent.parent)
RAY_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ray.scripts.scripts import main; main()"


class RayStartError(RuntimeError):
    """The local Ray did not come up; the text says what it printed."""


@dataclass
class LocalCluster:
    """A running local Ray. Use as a context manager, or call stop().

    address is the dashboard's, for job submission; gcs_address is for ray.init of a driver on this machine.
    """

    address: str
    gcs_address: str
    token_path: Path
    session: Path
    seconds_to_start: float
    _guard: subprocess.Popen

    @property
    def token(self) -> str:
        """The secret that every client has to send."""
        return self.token_path.read_text().strip()

    def environment(self) -> dict[str, str]:
        """What a driver on this machine needs in its environment before it imports Ray."""
        return {**ray_environment(self.token_path), "RAY_ADDRESS": self.gcs_address}

    @property
    def guard_pid(self) -> int:
        """The process that everything of this cluster descends from."""
        return self._guard.pid

    def is_running(self) -> bool:
        """Whether Ray and its guard are there."""
        return self._guard.poll() is None

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ends exactly the processes of this cluster and removes its folder.

        Raises:
            RuntimeError: something was still there after timeout_s.
        """
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            code = self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._guard.send_signal(signal.SIGKILL)
            raise RuntimeError(f"the local Ray in {self.session} did not end within {timeout_s:g} s") from None
        shutil.rmtree(self.session, ignore_errors=True)
        if code:
            raise RuntimeError(f"processes of the local Ray in {self.session} could not be ended (status {code})")

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def ray_environment(token_path: Path) -> dict[str, str]:
    """Ray's settings shared by the head and the drivers of a loopback cluster."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": NOBODY,
        # Ray turns 127.0.0.1 into the machine's outward address unless clusters of several nodes are off; the
        # variable is named after the systems where that is the default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without GPUs keep CUDA_VISIBLE_DEVICES; no warning
    }


def start_local(
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    *,
    temp_root: Path | str | None = None,
    start_timeout_s: float = 60.0,
) -> LocalCluster:
    """Starts a head node that only this machine and only holders of its token can reach; returns when it takes jobs.

    Args:
        num_cpus: CPUs that Ray may give away (a count, it does not bind cores), None for the machine's.
        num_gpus: the same for GPUs, None to let Ray find them.
        temp_root: folder for the session; it has to be short, because Unix socket names are limited to about 100
            characters. The token lies there, readable by this user only; ~/.ray is not touched. None takes the first
            that can be written of TMPDIR, if that is short enough, /tmp, /var/tmp and /dev/shm.

    Raises:
        RayStartError: it did not come up in time, or Ray is not installed.
    """
    last: RayStartError | None = None
    for _ in range(ATTEMPTS):
        try:
            return _start_once(num_cpus, num_gpus, _session_folder(temp_root), start_timeout_s)
        except RayStartError as error:
            last = error
            if "already in use" not in str(error) and "Failed to bind" not in str(error):
                raise
    raise RayStartError(f"no free port after {ATTEMPTS} attempts; {last}")


def _session_folder(temp_root: Path | str | None) -> Path:
    """A new folder, mode 0700, for one session."""
    reasons = []
    named = [("TMPDIR", os.environ.get("TMPDIR", "")), *(("", root) for root in TEMP_ROOTS)]
    for variable, root in [("", str(temp_root))] if temp_root is not None else named:
        if not root:
            continue
        name = f"{variable} = {root}" if variable else root
        try:
            resolved = Path(root).resolve()
            if len(os.fsencode(resolved)) > LONGEST_ROOT:
                reasons.append(f"{name} is longer than the {LONGEST_ROOT} characters that leave room for Ray's sockets")
                continue
            return Path(tempfile.mkdtemp(prefix="tt-", dir=resolved))
        except OSError as error:
            reasons.append(f"{name}: {error.strerror or error}")
    raise RayStartError(
        f"there is no folder for Ray's session ({'; '.join(reasons)}); set TMPDIR to a folder that can be written, of "
        f"at most {LONGEST_ROOT} characters, or use --launcher local, which needs none"
    )


def _start_once(num_cpus: int | None, num_gpus: int | None, session: Path, start_timeout_s: float) -> LocalCluster:
    begun = time.monotonic()
    token_path = session / "token"
    with os.fdopen(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    port = free_ports(1)[0]
    log = session / "ray-start.log"
    spec = {
        "command": _ray_command(session / "r", port, num_cpus, num_gpus),
        "environment": {
            **ray_environment(token_path),
            MARK_NAME: str(session),
            "RAY_START_HOOK": "cluster.ray_guard.without_ray_client",
            "PYTHONPATH": os.environ.get("PYTHONPATH"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        },
        "session": str(session),
        "log": str(log),
        "ended": str(session / "ended"),
    }
    spec_path = session / "guard.json"
    spec_path.write_text(json.dumps(spec))
    guard = subprocess.Popen(
        [sys.executable, "-m", "cluster.ray_guard", str(spec_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_clean_environment(),
        start_new_session=True,  # a Ctrl-C at the terminal must not end Ray before the job has saved
    )
    cluster = LocalCluster(f"http://127.0.0.1:{port}", "", token_path, session, 0.0, guard)
    try:
        cluster.gcs_address = _wait_until_ready(cluster, log, begun + start_timeout_s, start_timeout_s)
    except BaseException:
        cluster.stop()
        raise
    cluster.seconds_to_start = time.monotonic() - begun
    return cluster


def _wait_until_ready(cluster: LocalCluster, log: Path, deadline: float, limit_s: float) -> str:
    # The address file appears when the node is registered; the dashboard answers somewhat before or after that.
    address_file = cluster.session / "r" / "ray_current_cluster"
    while time.monotonic() < deadline:
        if not cluster.is_running():
            raise RayStartError(f"Ray ended during its start:\n{last_lines(log, 30)}")
        if address_file.exists() and _answers(cluster.address, cluster.token):
            return address_file.read_text().strip()
        time.sleep(0.05)
    waited_for = "its dashboard" if address_file.exists() else "its node"
    raise RayStartError(f"Ray did not start within {limit_s:g} s (waited for {waited_for}):\n{last_lines(log, 30)}")


def _answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would get the token
    try:
        with opener.open(request, timeout=2.0) as response:
            return response.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _ray_command(temp_dir: Path, port: int, num_cpus: int | None, num_gpus: int | None) -> list[str]:
    if importlib.util.find_spec("ray") is None:
        raise RayStartError("Ray is not installed; install it with: pip install 'ray[default]'")
    # The project's root is on the path of this one process, for its start hook; a job must find its own copy instead.
    command = [sys.executable, "-P", "-c", RAY_START, ROOT, "start", "--head", "--block"]
    # The number 0 makes each part bind a port that is free; only the dashboard needs a number in advance.
    command += ["--node-ip-address", "127.0.0.1", "--port", "0"]
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(port), "--include-dashboard", "true"]
    command += ["--temp-dir", str(temp_dir), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    command += ["--disable-usage-stats", "--no-monitor", "--include-log-monitor", "false"]
    command += ["--log-color", "false"]
    if num_cpus is not None:
        command += ["--num-cpus", str(num_cpus)]
    if num_gpus is not None:
        command += ["--num-gpus", str(num_gpus)]
    return command


def _clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*FOREIGN_PREFIXES, "RAY_")) and k != MARK_NAME}
    kept |= without_proxies(kept)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, kept.get("PYTHONPATH")]))
    return kept
