"""Runs commands side by side, each in a process of one thread, and says now and then how far they are."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.start import ROOT

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_S = 0.2


class JobError(RuntimeError):
    """A job ended with an error; the message holds the end of what it said."""


@dataclass(frozen=True)
class Job:
    """A command of this project (`python -m MODULE ARGUMENTS`), and the file that receives what it says."""

    name: str
    module: str
    arguments: tuple[str, ...]
    log: Path


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    done: Callable[[Job], None],
    running: Callable[[list[Job]], None],
    every_s: float = 30.0,
) -> None:
    """Runs all jobs in order, up to `at_once` at a time; whatever ends this call ends the jobs still running.

    Args:
        done: called for each job that ended well.
        running: called every `every_s` seconds with the jobs that run.

    Raises:
        JobError: a job ended with an error; the others are stopped (they may be resumable).
    """
    waiting, started = list(jobs), dict[Job, subprocess.Popen[bytes]]()
    said = time.monotonic()
    with _ended_by_signal():
        try:
            while waiting or started:
                while waiting and len(started) < at_once:
                    job = waiting.pop(0)
                    started[job] = _start(job)
                time.sleep(_POLL_S)
                for job, process in list(started.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del started[job]
                    if status:
                        raise JobError(f"{job.name} ended with status {status}; {job.log} says:\n{_tail(job.log)}")
                    done(job)
                if started and time.monotonic() - said > every_s:
                    running(list(started))
                    said = time.monotonic()
        finally:
            for process in started.values():
                process.terminate()
            for process in started.values():
                process.wait()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Turns SIGTERM into SystemExit while the block runs, so that the jobs are ended with this process."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _start(job: Job) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", job.module, *job.arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
