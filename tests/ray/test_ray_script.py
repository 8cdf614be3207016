"""A cluster that launch/jobs/ray_cluster.sh starts, in a shell with a foreign python first on PATH, a web proxy, and
variables that lead Ray's client to another cluster. What those would get is recorded, and has to be nothing."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from cluster.ports import free_ports
from cluster.process import descendants, end_processes, is_alive
from tests.end_to_end.conftest import CONFIG

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "jobs" / "ray_cluster.sh"
BIN = Path(sys.executable).parent


class Recorder(http.server.BaseHTTPRequestHandler):
    """A web proxy, or somebody else's dashboard, that only writes down what it is asked."""

    asked: list[str] = []  # noqa: RUF012  (of the class: each request makes a new object)

    def _record(self) -> None:
        self.asked.append(f"{self.requestline} {self.headers}")
        self.send_error(502)

    do_GET = do_POST = do_PUT = do_DELETE = do_CONNECT = _record

    def log_message(self, *arguments: object) -> None:
        """Nothing goes to standard error."""


@pytest.fixture(scope="module")
def recorder():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def hostile(recorder, tmp_path_factory):
    """The environment of a user's shell: nothing of ours on PATH, no HOME, proxies, another cluster's addresses."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("python", "python3"):
        foreign = folder / name
        foreign.write_text("#!/bin/sh\necho this is a foreign python >&2\nexit 99\n")
        foreign.chmod(0o755)
    (folder / "netrc").write_text("default login somebody password else\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV")) and k != "HOME"}
    proxies = dict.fromkeys(
        ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), recorder
    )
    return {
        **kept,
        **proxies,
        "no_proxy": "example.org",
        "NETRC": str(folder / "netrc"),
        "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin",
        "RAY_ADDRESS": recorder,
        "RAY_API_SERVER_ADDRESS": recorder,
    }


@pytest.fixture(scope="module")
def cluster(hostile, tmp_path_factory):
    """Its environment, with the token's file and the dashboard's address; ended by its own process."""
    folder = tmp_path_factory.mktemp("cluster")
    # Ray keeps the ports 10002 to 19999 for its workers.
    port, dashboard = [number for number in free_ports(24) if not 10000 <= number < 20000][:2]
    environment = {
        **hostile,
        "TRIMTAB_BIN": str(BIN),
        "TRIMTAB_RAY_TOKEN": str(folder / "token"),
        "RAY_HEAD_PORT": str(port),
        "RAY_DASHBOARD_PORT": str(dashboard),
        "RAY_NODE_IP": "127.0.0.1",
        "RAY_TMPDIR": f"/tmp/tt-{os.getpid()}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    subprocess.run([SCRIPT, "token"], env=environment, check=True, capture_output=True)
    said = folder / "head.log"
    with said.open("w") as log:
        head = subprocess.Popen(
            [SCRIPT, "head"], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    everything: set[int] = set()
    try:
        deadline = time.monotonic() + 90
        while "What next" not in said.read_text() or not answers(dashboard, folder / "token"):
            everything |= set(descendants(head.pid))
            assert time.monotonic() < deadline and head.poll() is None, said.read_text()
            time.sleep(0.2)
        everything |= set(descendants(head.pid))
        yield {**environment, "said": str(said), "address": f"http://127.0.0.1:{dashboard}"}
    finally:
        everything |= set(descendants(head.pid))
        head.send_signal(signal.SIGTERM)
        head.wait(120)  # a job that a failed test has left saves first
        end_processes(lambda: [pid for pid in everything if is_alive(pid)], grace_s=2.0)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def answers(port: int, token: Path) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/version")
    request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from data.pack import pack

    folder = tmp_path_factory.mktemp("script")
    pack([str(ROOT / "cluster")], folder / "tiny", tokenizer="bytes", heldout_kib=4)
    path = folder / "tiny.toml"
    path.write_text(CONFIG.format(path=folder / "tiny") + "\n[cluster]\nworkers = 1\n\n[parallel]\nep_size = 1\n")
    return path


def submit(cluster, *arguments, script=False, **options):
    command = [SCRIPT, "submit"] if script else [BIN / "trimtab", "submit"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["TRIMTAB_RAY_TOKEN"]}
    return subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        env={**cluster, **token}, cwd=options.get("cwd"), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_the_documented_commands_run_and_nobody_else_is_asked(cluster, config, tmp_path):
    run = submit(cluster, config, "--run", tmp_path / "run", "train.steps=3", script=True)
    output, _ = run.communicate(timeout=150)
    assert run.returncode == 0, output
    assert "foreign" not in output and "bits per byte" in output
    assert (tmp_path / "run" / "report.md").exists()
    assert "RAY_ADDRESS =" not in output  # the script leaves them out
    assert Recorder.asked == []
    said = Path(cluster["said"]).read_text()
    assert "What next, instead of the steps that Ray prints" in said and "worker 127.0.0.1" in said


def test_a_job_outlives_its_terminal_and_is_followed_again(cluster, config, tmp_path):
    address = cluster["address"]
    run = submit(cluster, config, "--run", tmp_path / "run", "train.steps=100000", "--address", address, "--no-summary")
    lines, job = [], ""
    for line in run.stdout:
        lines.append(line)
        if line.startswith("ray: the job is "):
            job = line.split()[4].rstrip(";")
        if "step 2" in line or "step      2" in line or (tmp_path / "run" / "metrics.jsonl").exists():
            break
    assert job, "".join(lines)
    run.send_signal(signal.SIGHUP)
    rest, _ = run.communicate(timeout=30)
    assert run.returncode == 1 and f"the job {job} goes on" in rest, "".join(lines) + rest
    assert "RAY_ADDRESS = " in "".join(lines), "what is not heeded is told"

    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["TRIMTAB_RAY_TOKEN"]}
    jobs = [str(BIN / "trimtab"), "jobs"]
    listed = subprocess.run(
        [*jobs, "--json", "--address", address], env={**cluster, **token}, capture_output=True, text=True, timeout=60
    )
    found = {one["job"]: one for one in json.loads(listed.stdout.splitlines()[-1])["jobs"]}
    assert found[job]["status"] == "RUNNING" and found[job]["run"] == str(tmp_path / "run")

    followed = subprocess.run(
        [*jobs, job, "--stop", "--address", address],
        env={**cluster, **token},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert followed.returncode == 75 and "stopped on request" in followed.stdout, followed.stdout + followed.stderr
    assert Recorder.asked == []


def test_a_run_in_the_folder_of_a_job_is_refused_and_no_wait_does_not_wait(cluster, config, tmp_path):
    """Through Ray's own command, as people use it, with a relative --run."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["TRIMTAB_RAY_TOKEN"]}
    environment = {**cluster, **token, "RAY_ADDRESS": cluster["address"]}
    for name in [name for name in environment if "proxy" in name.lower()] + ["NETRC", "RAY_API_SERVER_ADDRESS"]:
        del environment[name]  # Ray's own command would heed them
    (tmp_path / "mine").mkdir()
    run_env = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    command = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--working-dir",
        str(tmp_path / "mine"),
        "--runtime-env-json",
        run_env,
    ]
    command += ["--", sys.executable, "-m", "launch", "train", str(config), "--launcher", "ray", "--run", "runs/rel"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "lies in a folder that Ray made for this job's code" in text, text

    began = time.monotonic()
    run = submit(
        cluster, config, "--run", tmp_path / "later", "train.steps=1", "--address", cluster["address"], "--no-wait"
    )
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "has taken the job" in output and time.monotonic() - began < 60, output
    deadline = time.monotonic() + 60
    while not list((tmp_path / "later" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, "the job did not run by itself"
        time.sleep(0.2)
