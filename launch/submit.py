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

    Without --address a local Ray cluster is started on loopback with token authentication, and stopped at the end. It
    shares this machine's storage, so everything is checked, and data packed, here. With --address the job does both:
    it finds the data and the run's folder by their absolute paths, on storage that all of the cluster's machines see.

    Returns:
        The job's exit status: 0, 75, 2 or 1; 0 with --no-wait.
    """
    address = dashboard_address(options.address)
    plan = preflight.check(
        options.config, options.assignments, run=options.run, launcher="ray", resume=options.resume,
        accepted=options.accept_change, local_cluster=not address, insecure=options.insecure, elsewhere=bool(address),
    )  # fmt: skip
    if not address and options.no_wait:
        raise ConfigError(
            ["--no-wait needs --address: the local cluster that submit starts ends with it; use nohup for a run on it"]
        )
    check_access(address, options.insecure)
    for note in plan.notes:
        say(note)
    if plan.done:
        from launch.summary import show_summary

        figures = show_summary(plan.run, say)
        if options.json:
            print_json({"exit_status": EXIT_OK, **figures})
        return EXIT_OK
    if not address:
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
            say(f"ray: ready after {cluster.seconds_to_start:.1f} s; its dashboard {cluster.address} asks for the "
                f"token in {cluster.token_path}")  # fmt: skip
            address, token = cluster.address, cluster.token
            stack.callback(lambda: say("ray: stopping the local cluster"))
        status = _run_job(plan, options, address, token)
    if status == EXIT_OK and not options.no_wait and not plan.run.exists():
        say(f"the job is done; its run folder {plan.run} is on the cluster's storage")
    return status


def dashboard_address(given: str | None) -> str:
    """The dashboard to submit to: what was given, else RAY_API_SERVER_ADDRESS, else "" for a cluster of our own.

    Variables with which Ray's own client would go elsewhere are told, as they are not heeded.
    """
    variable = os.environ.get("RAY_API_SERVER_ADDRESS", "")
    address = (given or variable).rstrip("/")
    if given and variable and variable.rstrip("/") != address:
        say(f"ray: --address {given} is used, RAY_API_SERVER_ADDRESS = {variable} is not")
    if other := os.environ.get("RAY_ADDRESS", ""):
        used = f"the job goes to {address}" if address else "a local cluster is started; --address names a running one"
        say(f"ray: RAY_ADDRESS = {other} is not used by submit: {used}")
    return address


def check_access(address: str, insecure: bool) -> None:
    """Refuses a dashboard that takes jobs from anybody or gets the token readably, and what is no dashboard.

    Raises:
        ConfigError: with every reason.
    """
    from cluster.ray_access import address_problem, dashboard_problems

    if address and (problems := dashboard_problems(address) if not insecure else list(address_problem(address))):
        raise ConfigError(problems)


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
    job_id = f"{plan.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if token is None:
        say(f"ray: the job is {job_id}; `trimtab jobs {job_id} --address {address}` follows it again, --stop ends it")
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
                submission_id=job_id,
                metadata={"run": str(plan.run)},
                stop_grace_s=plan.config.cluster.stop_grace_s,
                on_output=log.show,
                outlives=token is None,
                wait=not options.no_wait,
            )
        except JobError as error:
            raise ConfigError([str(error)]) from error
    if options.json:
        print_json({**(log.figures or {"exit_status": status}), "job": job_id})
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
