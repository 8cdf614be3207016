"""The process of one rank, started by the local launcher: `python -m cluster.rank_process SPEC.json`.

Standard input is a pipe from the launcher. The line "stop" asks for a graceful stop; its end means that the launcher
is gone, and then this process ends too.
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from cluster.context import RankContext
from cluster.entry import run_entry
from cluster.monitor import start_monitor, stop_monitor
from cluster.process import about_to_end, die_with_parent, kill_own_group, watch_pipe
from cluster.redact import guard_output


def started_file(control: Path, rank: int) -> Path:
    """Appears when the rank is about to run its entry."""
    return control / f"rank-{rank}.started"


def report_file(control: Path, rank: int) -> Path:
    """Holds the rank's report once its entry has ended."""
    return control / f"rank-{rank}.json"


def main(spec_path: str) -> int:
    """Runs the entry in this process's main thread and leaves a report; returns the exit status."""
    spec = json.loads(Path(spec_path).read_text())
    die_with_parent(spec["parent_pid"])
    faulthandler.enable()
    guard_output()
    sys.path[:] = spec["sys_path"]
    context = RankContext.from_json(spec["context"])
    watch_pipe(0, lambda line: context.stop.set() if line == "stop" else None, kill_own_group)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: context.stop.set())

    control = Path(spec["control"])
    started_file(control, context.rank).touch()
    monitor = start_monitor(spec["watch"], context)
    report = run_entry(spec["entry"], spec["payload"], context)
    stop_monitor(monitor)
    if not report["ok"]:
        print(report["error"], file=sys.stderr, flush=True)
    path = report_file(control, context.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report))
    os.replace(partial, path)
    sys.stdout.flush()
    sys.stderr.flush()
    if not report["ok"]:
        os._exit(report["exit_code"])  # threads stuck in a collective would hold a normal exit up
    about_to_end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
