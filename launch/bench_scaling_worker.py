"""One run of `trimtab bench scaling` in a process of its own: starts the ranks, keeps what they and the metrics say.

Run as `python -m launch.bench_scaling_worker CONFIG.toml RUN RESULT.json JOB.json`.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from launch.preflight import check
from launch.runfolder import RunFolder, committed_metrics
from launch.start import report_end, start

ENTRY = "launch.bench_scaling_rank:main"
KEPT = (
    "step", "loss", "tokens", "step_seconds", "data_wait_seconds", "all_to_all_seconds", "exposed_all_to_all_seconds",
    "waiting_seconds", "bytes_sent", "max_vio", "max_vio_rank",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Trains from the first step, whatever an interrupted call left behind, and writes the result last and whole."""
    config_path, run_path, result_path, job_path = arguments
    job: dict[str, Any] = json.loads(Path(job_path).read_text(encoding="utf-8"))
    shutil.rmtree(run_path, ignore_errors=True)
    plan = check(config_path, [], run=run_path, launcher=job["launcher"])
    ended = start(plan, cause="trimtab bench scaling", entry=ENTRY, extra={"bench": job["bench"]})
    shutil.rmtree(RunFolder(plan.run).checkpoints, ignore_errors=True)  # nobody goes on from here
    status = report_end(plan, ended)
    if status != EXIT_OK:
        return status
    ranks = [result for result in ended.results if result]
    if len(ranks) < plan.world_size or any(rank["status"] != "done" for rank in ranks):
        print(f"{plan.run}: not every rank has finished", file=sys.stderr)
        return EXIT_FAILED
    result = {
        "name": job["name"],
        "settings": job["settings"],
        "ep_size": plan.config.parallel.ep_size,
        "metrics": [{key: step[key] for key in KEPT} for step in committed_metrics(RunFolder(plan.run))],
        "ranks": [rank["steps"] for rank in ranks],
        "collectives_timed": all(rank["collectives_timed"] for rank in ranks),
        "sweep": ranks[0]["sweep"],
    }
    unfinished = Path(result_path + ".unfinished")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(result_path)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
