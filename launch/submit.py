"""`trimtab submit`: the same training through `ray job submit`, on a cluster that runs or on a local one of its own."""

import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from launch import preflight
from launch.config import ConfigError, dump
from launch.output import print_json
from launch.preflight import Plan, pack_if_needed
from launch.start import ROOT, say

CONFIG_FILE = "submitted.toml"


def submit(options: Any) -> int:
    """Checks everything that can be checked here, then submits the run as a Ray job and follows its log.

    Without --address a local Ray cluster is started on loopback with token authentication, and stopped at the end.
    Data is packed here beforehand: the job finds it by its absolute path, as it does the run's folder, so on a cluster
    of several machines both must lie on storage that all of them see.

    Returns:
        The job's exit status: 0, 75, 2 or 1.
    """
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    plan = preflight.check(
        options.config, options.assignments, run=options.run, launcher="ray", resume=options.resume,
        accepted=options.accept_change, local_cluster=not address, insecure=options.insecure,
    )  # fmt: skip
    if address and not options.insecure:
        from cluster.ray_access import dashboard_problems

        if problems := dashboard_problems(address):
            raise ConfigError(problems)
    for note in plan.notes:
        say(note)
    if plan.done:
        from launch.summary import show_summary

        figures = show_summary(plan.run, say)
        if options.json:
            print_json({"exit_status": EXIT_OK, **figures})
        return EXIT_OK
    pack_if_needed(plan, say)
    with ExitStack() as stack:
        token = None
        if not address:
            from cluster.ray_local import RayStartError, start_local

            say("ray: starting a local cluster on loopback, with token authentication")
            try:
                cluster = stack.enter_context(
                    start_local(num_cpus=plan.config.cluster.workers * plan.config.cluster.cpus_per_worker)
                )
            except RayStartError as error:
                print(f"trimtab: {error}", file=sys.stderr)
                return EXIT_FAILED
            say(f"ray: ready after {cluster.seconds_to_start:.1f} s at {cluster.address}")
            address, token = cluster.address, cluster.token
            stack.callback(lambda: say("ray: stopping the local cluster"))
        status = _run_job(plan, options, address, token)
    if status == EXIT_OK and not plan.run.exists():
        say(f"the job is done; its run folder {plan.run} is on the cluster's storage")
    return status


def _run_job(plan: Plan, options: Any, address: str, token: str | None) -> int:
    from cluster.jobs import JobError
    from cluster.jobs import submit as submit_job
    from cluster.staging import stage

    command = ["python", "-m", "launch", "train", CONFIG_FILE, "--launcher", "ray", "--run", str(plan.run)]
    command += ["--resume", plan.resume, *(f"--accept-change={key}" for key in plan.accepted)]
    command += ["--insecure"] if options.insecure else []
    command += ["--no-summary"] if options.no_summary else []
    command += ["--json"] if options.json else []
    if token is not None:  # a local cluster: the job runs under this very interpreter
        command[0] = sys.executable
    with tempfile.TemporaryDirectory(prefix="trimtab-job-") as folder:
        working_dir = stage(ROOT, Path(folder) / "code", extra={CONFIG_FILE: dump(plan.config)})
        say(f"ray: submitting the job: {shlex.join(command)}")
        log = JobLog()
        try:
            status = submit_job(
                command,
                working_dir=working_dir,
                address=address,
                token=token,
                env_vars={"PYTHONUNBUFFERED": "1"},
                submission_id=f"{plan.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                metadata={"run": str(plan.run)},
                stop_grace_s=plan.config.cluster.stop_grace_s,
                on_output=log.show,
            )
        except JobError as error:
            raise ConfigError([str(error)]) from error
    if options.json:
        print_json(log.figures or {"exit_status": status})
    return status


class JobLog:
    """Shows a job's log and keeps the object that `train --json` wrote into it: a job's two outputs are one log."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    def show(self, text: str) -> None:
        """Takes whole lines."""
        for line in text.splitlines(keepends=True):
            if line.startswith('{"exit_status": '):
                try:
                    self.figures = json.loads(line)
                    continue
                except ValueError:
                    pass  # a line of text after all
            sys.stdout.write(line)
        sys.stdout.flush()
