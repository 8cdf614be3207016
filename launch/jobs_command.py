"""`trimtab jobs`: lists the jobs of a running Ray cluster, follows one again, or stops it."""

import argparse
import time
from collections.abc import Callable
from typing import Any

from cluster.context import EXIT_OK
from launch.config import ConfigError
from launch.output import print_json

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # of `launch/jobs/ray_cluster.sh head`, here or at the end of an ssh tunnel


def add_jobs_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `jobs` with `command(name, run, help, example)`."""
    jobs = command(
        "jobs", run_jobs, "List the jobs of a running Ray cluster, follow one, or stop it.",
        "jobs debug-20260101-120000-4711 --address http://127.0.0.1:8265",
    )  # fmt: skip
    jobs.add_argument("job", nargs="?", help="follow this job's log to its end; without it, the jobs are listed")
    jobs.add_argument("--address", help=f"dashboard of the cluster (default: {DEFAULT_ADDRESS})")
    jobs.add_argument("--stop", action="store_true", help="ask the job to save and stop, then follow it to its end")
    jobs.add_argument("--insecure", action="store_true", help="ask a cluster although it asks nobody for a token")
    jobs.add_argument("--json", action="store_true", help="print the list as one JSON object")


def run_jobs(options: Any) -> int:
    """Lists, follows or stops; returns a job's exit status as `submit` does."""
    from cluster.jobs import JobError, follow, list_jobs
    from launch.submit import check_access, dashboard_address

    address = dashboard_address(options.address) or DEFAULT_ADDRESS
    if options.stop and not options.job:
        raise ConfigError(["--stop needs a job; `trimtab jobs` lists them"])
    check_access(address, options.insecure)
    try:
        if options.job:
            return follow(options.job, address=address, stop_it=options.stop)
        jobs = list_jobs(address=address)
    except JobError as error:
        raise ConfigError([str(error)]) from error
    if options.json:
        print_json({"jobs": jobs})
        return EXIT_OK
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["began"])) if job["began"] else "not yet"
        print(f"{job['job']}  {job['status']}  {began}  {job['run']}")
    if not jobs:
        print(f"the Ray cluster at {address} knows no jobs")
    return EXIT_OK
