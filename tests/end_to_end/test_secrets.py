"""Secrets in the environment and in addresses reach no file of a run and no terminal, whatever fails and says them."""

import http.server
import threading
from pathlib import Path
from urllib.parse import quote

from tests.end_to_end.conftest import ROOT, events
from tests.object_store import register_for_children

PLANTED = {
    "PLANTED_SECRET_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzEXAMPLEKEY",
    "PLANTED_TOKEN": "tok-0c3f5a1e9b7d",
    "PLANTED_PASSWORD": "correct-horse-battery",
}
SIGNATURE = "5" * 64  # in an address that the storage shows


def places(folder: Path, *texts: str) -> list[str]:
    """Where a planted secret is found, raw or quoted: every file below a folder, and texts."""
    wanted = [form.encode() for value in (*PLANTED.values(), SIGNATURE) for form in (value, quote(value, safe=""))]
    found = [str(path) for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in wanted)]
    return found + [text for text in texts if any(w in text.encode() for w in wanted)]


def test_a_run_whose_storage_tells_all(trimtab, config: Path, tmp_path: Path) -> None:
    register_for_children(tmp_path / "plugin")
    (tmp_path / "objects").mkdir()
    run = tmp_path / "run"
    words = [
        "train", config, "checkpoint.dir=leaky://bucket/run", "checkpoint.every_steps=1", "train.steps=3",
        "checkpoint.max_failed_saves=2", "cluster.restarts=0", "--launcher", "local", "--no-summary", "--run",
    ]  # fmt: skip
    places_of = {"PYTHONPATH": f"{ROOT}:{tmp_path / 'plugin'}", "OBJECT_STORE": str(tmp_path / "objects"), **PLANTED}
    refused = trimtab(*words, tmp_path / "refused", **places_of, LEAKY_ALL="1")
    assert refused.returncode == 2 and "cannot be written" in refused.stderr, "a place that takes nothing is refused"
    assert "***PLANTED_SECRET_KEY***" in refused.stderr and places(tmp_path, refused.stdout, refused.stderr) == []
    done = trimtab(*words, run, **places_of)
    assert done.returncode == 1, done.stdout + done.stderr
    shown = "denied: key ***PLANTED_SECRET_KEY***, GET https://***@host/x?X-Amz-Signature=***"
    alarms = [event["cause"] for event in events(run) if event["kind"] == "alarm"]
    assert len(alarms) == 2 and all(shown in cause for cause in alarms)
    [failure] = [event for event in events(run) if event["kind"] == "failure"]
    assert failure["cause"] == "storage" and shown in failure["message"] and shown in done.stderr
    for rank in (0, 1):
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        assert shown in log and f"rank-{rank:05d}.safetensors with ***PLANTED_SECRET_KEY***" in log
    assert list((run / "tensorboard").iterdir())
    assert places(run, done.stdout, done.stderr) == []
    report = trimtab("report", run, **PLANTED)
    assert report.returncode == 0, report.stderr
    assert places(run, report.stdout, report.stderr) == []


def test_a_configuration_that_holds_secrets(trimtab, config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("every_steps = 3", 'every_steps = 3\ndir = "s3://me:correct-horse-battery@b/x"')
    (tmp_path / "with.toml").write_text(text)
    refused = trimtab(
        "train", tmp_path / "with.toml", f"data.cache_dir=/tmp/{PLANTED['PLANTED_TOKEN']}", "--launcher", "debug",
        "--run", tmp_path / "run", **PLANTED,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "checkpoint.dir holds a secret" in refused.stderr and "data.cache_dir holds a secret" in refused.stderr
    assert not (tmp_path / "run").exists()
    packed = trimtab(
        "data", "pack", f"https://x:{PLANTED['PLANTED_TOKEN']}@host/y", "--out", tmp_path / "out", **PLANTED
    )
    assert packed.returncode == 2 and "SOURCE[0] holds a secret" in packed.stderr
    assert places(tmp_path / "out", refused.stdout, refused.stderr, packed.stdout, packed.stderr) == []


class OpenDashboard(http.server.BaseHTTPRequestHandler):
    """Answers everybody."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_a_job_is_not_sent_to_a_cluster_without_a_token(trimtab, config: Path, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenDashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        refused = trimtab("submit", config, "--address", address, "--run", tmp_path / "run")
        server.shutdown()
    assert refused.returncode == 2
    assert "takes jobs without a token (status 200)" in refused.stderr and "--insecure" in refused.stderr
    assert not (tmp_path / "run").exists()
