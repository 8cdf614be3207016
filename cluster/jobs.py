"""Submits a command as a Ray job, follows its log, stops it gracefully, and returns its exit status."""

import asyncio
import contextlib
import logging
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.context import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, EXIT_STOPPED
from cluster.flag import StopFlag
from cluster.job_main import find_exit_code
from cluster.local import print_line
from cluster.signals import StopSignals
from cluster.web_proxies import changed_environment, direct_requests

PROMISED = (EXIT_OK, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_FAILED)
POLL_S = 0.3
HTTP_PATIENCE_S = 30.0  # for a dashboard that does not answer in the middle of a job
CHATTY_LOGGERS = (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
# Ray's client goes to the cluster that one of these names, whatever address it is given (RAY_API_SERVER_ADDRESS first).
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
END_MARGIN_S = 15  # more than the job's own grace, so that it can end its ranks itself before Ray kills it


class JobError(RuntimeError):
    """The job could not be submitted; the text says what to do."""


def submit(
    entrypoint: Sequence[str],
    *,
    working_dir: Path,
    address: str,
    token: str | None = None,
    env_vars: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    metadata: Mapping[str, str] | None = None,
    stop_grace_s: float = 60.0,
    entrypoint_num_cpus: float = 0,
    stop: StopFlag | None = None,
    on_output: Callable[[str], None] = print_line,
    outlives: bool = False,
    wait: bool = True,
) -> int:
    """Runs a command on the cluster and returns its exit status: 0, 75, 2, or 1 for any other end.

    SIGINT, SIGTERM or `stop` ask Ray to stop the job, which then has stop_grace_s (and a margin) to end; the log is
    followed until it has. A second Ctrl-C stops waiting; the job is being stopped all the same.

    Args:
        entrypoint: the command and its arguments, run in working_dir on the head node without reserving a CPU. Where
            it begins with "python", that is the interpreter that Ray itself runs there.
        working_dir: sent to the cluster, see `staging.stage`; it holds the folder `cluster`.
        address: of the dashboard, "http://host:8265".
        token: sent with every request; None takes it from where Ray looks (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH).
        submission_id: a name for the job; a cluster takes each only once.
        outlives: the cluster stays when this process ends, so SIGHUP (a lost terminal) leaves the job running and
            returns 1; otherwise SIGHUP stops the job as SIGTERM does.
        wait: False returns 0 once the cluster has taken the job.

    Raises:
        JobError: nothing answers at the address, the token is missing or wrong, or the job was refused.
    """
    # The grace is read by the process that supervises the job, which gets the job's runtime environment.
    grace = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(stop_grace_s) + END_MARGIN_S)}
    request = {
        # Without the shell's `exec`, the job's process loses its parent when Ray ends the shell, and may stay as a
        # zombie for which Ray then waits until the grace is over.
        "entrypoint": "exec " + shlex.join(["sh", "cluster/job_main.sh", *entrypoint]),
        "submission_id": submission_id,
        "metadata": dict(metadata or {}),
        "runtime_env": {"working_dir": str(working_dir), "env_vars": {**(env_vars or {}), **grace}},
        "entrypoint_num_cpus": entrypoint_num_cpus,
    }
    with direct_requests(address), StopSignals(stop, hangup=StopFlag() if outlives else None) as signals:
        client = _client(address, token)
        job_id = _send(client, request, address)
        if not wait:
            on_output(f"ray: the cluster has taken the job {job_id}\n")
            return EXIT_OK
        return _followed(client, address, job_id, signals, stop_grace_s, on_output)


def follow(
    job_id: str,
    *,
    address: str,
    token: str | None = None,
    stop_it: bool = False,
    stop_grace_s: float = 60.0,
    on_output: Callable[[str], None] = print_line,
) -> int:
    """Follows a job that was submitted before, from the beginning of its log; returns what `submit` does.

    Args:
        stop_it: asks Ray to stop the job first.

    Raises:
        JobError: nothing answers at the address, the token is missing or wrong, or it knows no such job.
    """
    with direct_requests(address), StopSignals(hangup=StopFlag()) as signals:
        client = _client(address, token)
        try:
            client.get_job_status(job_id)
        except RuntimeError as error:
            raise JobError(f"the Ray cluster at {address} knows no job {job_id}; `trimtab jobs` lists them") from error
        if stop_it:
            signals.stop.set()
        return _followed(client, address, job_id, signals, stop_grace_s, on_output)


def list_jobs(*, address: str, token: str | None = None) -> list[dict[str, Any]]:
    """The cluster's submitted jobs, the oldest first: job, status, began (seconds since 1970, None before), run.

    Raises:
        JobError: nothing answers at the address, or the token is missing or wrong.
    """
    with direct_requests(address):
        found = _client(address, token).list_jobs()
    jobs = [
        {
            "job": one.submission_id,
            "status": str(getattr(one.status, "value", one.status)),
            "began": one.start_time / 1000 if one.start_time else None,
            "run": (one.metadata or {}).get("run", ""),
        }
        for one in found
        if one.submission_id
    ]
    return sorted(jobs, key=lambda job: job["began"] or 0)


def _followed(
    client: Any,
    address: str,
    job_id: str,
    signals: StopSignals,
    stop_grace_s: float,
    on_output: Callable[[str], None],
) -> int:
    try:
        return _follow(client, job_id, signals, stop_grace_s, on_output)
    except (OSError, RuntimeError) as error:
        print(f"lost contact with the Ray cluster at {address} while the job {job_id} ran: {error}", file=sys.stderr)
        return EXIT_FAILED


def _client(address: str, token: str | None) -> Any:
    """Ray's client of exactly this dashboard; to be used inside `direct_requests`.

    Raises:
        JobError: nothing answers there, or the token is missing or wrong.
    """
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise JobError("submitting needs Ray; install it with: pip install 'ray[default]'") from None
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # after the import, which sets it
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        with changed_environment(dict.fromkeys(OVERRIDES)):
            client = JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise _token_wanted(address, error) from error
    except (ConnectionError, OSError) as error:
        raise JobError(
            f"no Ray dashboard answers at {address}; start a cluster or give another address ({error})"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise JobError(f"what answers at {address} is not a Ray dashboard that takes jobs: {error}") from error
    if client.get_address().rstrip("/") != address.rstrip("/"):
        raise JobError(
            f"Ray's client went to {client.get_address()} instead of {address}; no job was sent. Something in the "
            "environment leads it there: unset the variables whose names begin with RAY_ and submit again"
        )
    return client


def _send(client: Any, request: dict[str, Any], address: str) -> str:
    """Submits the job and returns its name."""
    from ray.exceptions import AuthenticationError

    try:
        return client.submit_job(**request)
    except AuthenticationError as error:
        raise _token_wanted(address, error) from error
    except (ConnectionError, OSError) as error:
        raise JobError(f"the Ray dashboard at {address} no longer answers; no job was started ({error})") from error
    except RuntimeError as error:
        raise JobError(f"the Ray cluster at {address} refused the job: {str(error).strip()}") from error


def _token_wanted(address: str, error: Exception) -> JobError:
    return JobError(
        f"the Ray cluster at {address} wants its token; put it into RAY_AUTH_TOKEN, or the name of its file "
        f"into RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token ({str(error).splitlines()[0]})"
    )


def _follow(
    client: Any, job_id: str, signals: StopSignals, stop_grace_s: float, on_output: Callable[[str], None]
) -> int:
    """Passes the job's log on until it has ended; returns its exit status."""
    keep = _Keeper(on_output)
    log = _LogFollower(client, job_id, keep)
    log.start()
    try:
        if not _wait(client, job_id, signals, keep, stop_grace_s):
            if signals.hangup is None or not signals.hangup.is_set():
                on_output("no longer waiting; the job is being stopped\n")
                return EXIT_FAILED
            with contextlib.suppress(OSError):  # the terminal is gone
                on_output(f"the terminal is gone; the job {job_id} goes on without it\n")
            return EXIT_FAILED
    finally:
        log.done.set()
    if keep.exit_code is None:  # the rest at once, instead of when the follower gets to it
        keep.add(client.get_job_logs(job_id), 0)
    keep.finish()
    code = _exit_code(client, job_id, keep)
    if code in PROMISED:
        return code
    cause = f"status {code} (signal {code - 128})" if code > 128 else f"status {code}"
    print(f"the job {job_id} ended with {cause}", file=sys.stderr)
    return EXIT_FAILED


def _wait(client: Any, job_id: str, signals: StopSignals, keep: "_Keeper", stop_grace_s: float) -> bool:
    """True when the job has ended, False when the user would not wait for that, or the terminal is gone."""
    asked_at: float | None = None
    silent_since: float | None = None
    while keep.exit_code is None:
        if signals.hangup is not None and signals.hangup.is_set():
            return False
        try:
            if client.get_job_status(job_id).is_terminal():
                return True
            silent_since = None
            if signals.stop.is_set() and asked_at is None:
                client.stop_job(job_id)
                asked_at = time.monotonic()
        except (ConnectionError, OSError, RuntimeError):
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > HTTP_PATIENCE_S:
                raise
        if signals.force.is_set() or (asked_at and time.monotonic() - asked_at > stop_grace_s + 2 * END_MARGIN_S):
            return False
        time.sleep(POLL_S)
    return True


def _exit_code(client: Any, job_id: str, keep: "_Keeper") -> int:
    if keep.exit_code is not None:
        return keep.exit_code
    info = client.get_job_info(job_id)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    print(f"the job {job_id} ended as {info.status}: {info.message or 'no message'}", file=sys.stderr)
    return EXIT_FAILED


class _Keeper:
    """Passes whole lines of the log on, once each, except the last one, which is for machines: the exit status."""

    def __init__(self, on_output: Callable[[str], None]) -> None:
        self.exit_code: int | None = None
        self._on_output = on_output
        self._seen = 0  # characters of the log
        self._partial = ""
        self._lock = threading.Lock()

    def add(self, text: str, start: int) -> None:
        """Takes a piece of the log that begins with its character `start`; what is known already is left out."""
        with self._lock:
            new = text[max(0, self._seen - start) :]
            self._seen = max(self._seen, start + len(text))
            lines = (self._partial + new).splitlines(keepends=True)
            self._partial = lines.pop() if lines and not lines[-1].endswith("\n") else ""
            code = find_exit_code("".join(lines))
            if shown := "".join(line for line in lines if find_exit_code(line) is None):
                self._on_output(shown)
            if code is not None:
                self.exit_code = code

    def finish(self) -> None:
        """Passes on a last line without an end."""
        with self._lock:
            if self._partial:
                self._on_output(self._partial + "\n")
            self._partial = ""


class _LogFollower(threading.Thread):
    """Follows the job's log over a websocket, about two seconds late, and again after a broken connection."""

    def __init__(self, client: Any, job_id: str, keep: _Keeper) -> None:
        super().__init__(name="job-log", daemon=True)
        self._client, self._job_id, self._keep = client, job_id, keep
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            try:
                asyncio.run(self._follow())
            except (OSError, RuntimeError):
                self.done.wait(1.0)
            else:
                return

    async def _follow(self) -> None:
        position = 0
        async for text in self._client.tail_job_logs(self._job_id):
            if self.done.is_set():
                return
            self._keep.add(text, position)
            position += len(text)
