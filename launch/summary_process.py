"""The summary of a run in a process of its own: `python -m launch.summary_process RUN`.

For the driver of a cluster's job, which is a client of Ray: torch and its libraries are loaded into a fresh process,
and what ends that process (oneMKL ends it with status 2 when it cannot load its own library) does not end the driver.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def summarize_apart(folder: Path, say: Callable[[str], None]) -> bool:
    """`summary.summarize_run` in a fresh process with this one's streams; returns whether that succeeded."""
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)]))
    sys.stdout.flush()
    status = subprocess.run(
        [sys.executable, "-m", "launch.summary_process", str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        say(
            f"summary: its process ended with {how}. The run is trained and saved; `trimtab eval {folder}` and "
            f"`trimtab report {folder}` evaluate and report it again"
        )
    return not status


def main(folder: str) -> None:
    """Summarizes the run, with secrets taken out of what is printed."""
    from cluster.redact import guard_output
    from launch.summary import summarize_run

    guard_output()
    summarize_run(Path(folder), lambda text: print(text, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
