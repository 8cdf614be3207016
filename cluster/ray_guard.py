"""Keeps a local Ray from outliving its owner: `python -m cluster.ray_guard SPEC.json`, with a pipe as standard input.

It starts `ray start --block` as a child. When the pipe ends (the owner closed it, or died in whatever way), when it is
asked by a signal, or when Ray ends by itself, it ends everything that came from that child and removes the session's
folder. Ray's processes are spread over many process groups and sessions, and some lose their parent on the way; this
process adopts them, so that none is overlooked.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.flag import StopFlag
from cluster.process import adopt_orphans, descendants, die_with_parent, end_processes, reap, watch_pipe

MARK_NAME = "TRIMTAB_RAY_SESSION"
RAY_GRACE_S = 4.0


def without_ray_client(ray_params: object, head: bool) -> None:
    """Called by `ray start` (RAY_START_HOOK): leaves out the Ray Client server, one Python process more and a port."""
    if head:
        ray_params.ray_client_server_port = None  # type: ignore[attr-defined]


def main(spec_path: str) -> int:
    """Runs until Ray or the owner has ended; returns 0 when nothing of the session is left, 1 otherwise."""
    spec = json.loads(Path(spec_path).read_text())
    wake = StopFlag()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: wake.set())
    adopt_orphans()
    wanted = {**os.environ, **spec["environment"]}
    environment = {name: value for name, value in wanted.items() if value is not None}
    own_pid = os.getpid()
    with open(spec["log"], "ab") as log:
        child = subprocess.Popen(
            spec["command"],
            env=environment,
            cwd=spec["session"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: die_with_parent(own_pid),  # no thread has been started yet
        ).pid
    watch_pipe(0, lambda line: None, wake.set)
    gone: dict[int, int] = {}
    while not wake.wait(0.1):
        # Reaping all the time matters: Ray waits for processes of a stopped job for as long as they are zombies.
        gone |= reap()
        if child in gone:
            Path(spec["ended"]).write_text(str(gone[child]))
            break
    if child not in gone:
        os.kill(child, signal.SIGTERM)  # `ray start --block` ends what it started, in the right order
        deadline = time.monotonic() + RAY_GRACE_S
        while child not in gone and time.monotonic() < deadline:
            time.sleep(0.05)
            gone |= reap()
    mark = f"{MARK_NAME}={spec['session']}"

    def left() -> list[int]:
        reap()
        return descendants(os.getpid(), mark)

    remaining = end_processes(left, grace_s=1.0)
    if not remaining and not Path(spec["ended"]).exists():
        shutil.rmtree(spec["session"], ignore_errors=True)
    return 1 if remaining else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
