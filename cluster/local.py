"""The local launcher: one process per rank on this machine, without Ray, without ports."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.config import ClusterConfig
from cluster.context import LaunchResult, RankContext, RankFailure
from cluster.cores import stated_threads
from cluster.entry import encode, loopback_interface, prepare_environment, thread_count
from cluster.flag import StopFlag
from cluster.logs import LogTail, begin_log, last_lines, rank_log
from cluster.monitor import hang_of, new_watch
from cluster.outcome import conclude
from cluster.process import signal_group
from cluster.rank_process import report_file, started_file
from cluster.signals import StopSignals

POLL_S = 0.03
LEAVING_S = 15.0  # between a rank's report and the end of its process


def print_line(text: str) -> None:
    """Writes rank 0's lines to this terminal as they come; a terminal that is gone must not end the run."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()


def run(
    entry: str,
    payload: dict,
    spec: ClusterConfig,
    *,
    log_dir: Path,
    generation: int = 0,
    stop: StopFlag | None = None,
    on_output: Callable[[str], None] = print_line,
) -> LaunchResult:
    """Runs the entry in spec.workers processes and waits for all of them.

    SIGINT, SIGTERM or `stop` ask every rank to stop; after spec.stop_grace_s they are killed. When one rank fails
    the others are asked to stop and killed after spec.failure_grace_s. Ranks die with this process.

    Args:
        log_dir: gets rank-N.log with all output of rank N; a generation above 0 appends.
        on_output: receives what rank 0 prints, whole lines.
    """
    text = encode(payload, "the payload")
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    control = Path(tempfile.mkdtemp(prefix="trimtab-"))
    try:
        with StopSignals(stop) as signals:
            gang = _Gang(spec, Path(log_dir), control, signals, on_output)
            try:
                gang.start(entry, text, generation)
                gang.wait()
            finally:
                gang.end()
        return conclude(gang.reports, gang.lost, signals.stop.is_set())
    finally:
        shutil.rmtree(control, ignore_errors=True)


@dataclass
class _Rank:
    process: subprocess.Popen
    started_at: float
    running: bool = False  # its entry has begun
    ended: bool = False
    reported_at: float = 0.0


class _Gang:
    """The ranks of one launch and the rules for ending them together."""

    def __init__(
        self,
        spec: ClusterConfig,
        log_dir: Path,
        control: Path,
        signals: StopSignals,
        on_output: Callable[[str], None],
    ) -> None:
        self.spec, self.log_dir, self.control, self.signals, self.on_output = spec, log_dir, control, signals, on_output
        self.ranks: list[_Rank] = []
        self.reports: list[dict | None] = [None] * spec.workers
        self.lost: list[RankFailure] = []
        self.tail: LogTail | None = None
        self.watch = new_watch(spec, log_dir)
        self._asked_to_stop = False
        self._kill_at: float | None = None
        self._killed = False

    def start(self, entry: str, payload_text: str, generation: int) -> None:
        world_size = self.spec.workers
        threads = thread_count(self.spec.threads_per_worker, world_size, stated_threads(os.environ))
        begun = [begin_log(rank_log(self.log_dir, rank), rank, generation) for rank in range(world_size)]
        self.tail = LogTail(rank_log(self.log_dir, 0), begun[0])
        for rank in range(world_size):
            context = RankContext(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                node_rank=0,
                n_nodes=1,
                init_method=f"file://{self.control}/rendezvous",
                generation=generation,
                launcher="local",
                interface=loopback_interface(),
                device_index=rank,
            )
            spec_file = self.control / f"rank-{rank}.spec"
            spec_file.write_text(
                json.dumps(
                    {
                        "entry": entry,
                        "payload": payload_text,
                        "context": context.to_json(),
                        "control": str(self.control),
                        "parent_pid": os.getpid(),
                        "watch": self.watch,
                        "sys_path": [os.path.abspath(path) for path in sys.path],
                    }
                )
            )
            environment = dict(os.environ)
            prepare_environment(environment, context, threads)
            root = str(Path(__file__).resolve().parent.parent)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
            environment["PYTHONUNBUFFERED"] = "1"
            with open(rank_log(self.log_dir, rank), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cluster.rank_process", str(spec_file)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C at the terminal reaches only the launcher
                )
            self.ranks.append(_Rank(process, time.monotonic()))

    def wait(self) -> None:
        """Returns when every rank has ended by itself or was killed."""
        while not all(rank.ended for rank in self.ranks):
            for number, rank in enumerate(self.ranks):
                self._look_at(number, rank)
            self._stream()
            self._decide()
            time.sleep(POLL_S)

    def end(self) -> None:
        """Kills whatever is left and takes the last output; safe to call at any time."""
        for rank in self.ranks:
            signal_group(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
            if rank.process.stdin:
                close_pipe(rank.process.stdin)
        self._stream(everything=True)

    def _look_at(self, number: int, rank: _Rank) -> None:
        if rank.ended:
            return
        code = rank.process.poll()
        if not rank.running:
            rank.running = started_file(self.control, number).exists()
        if code is None:
            self._hurry_leaving(number, rank)
            waited = time.monotonic() - rank.started_at
            if not rank.running and waited > self.spec.start_timeout_s and not self._killed:
                self._lose(number, "start", f"its process did not begin within {self.spec.start_timeout_s:g} s")
                self._kill()
            return
        rank.ended = True
        path = report_file(self.control, number)
        if path.exists():
            self.reports[number] = json.loads(path.read_text())
            if not self.reports[number]["ok"]:  # type: ignore[index]
                self._fail_soon()
        elif not any(failure.rank == number for failure in self.lost):
            if hang := hang_of(self.watch, number):
                self._lose(number, "hang", hang)
            elif code < 0:
                self._lose(number, "killed", f"its process was killed by {signal.Signals(-code).name}", -code)
            else:
                self._lose(number, "exited", f"its process ended with status {code} and left no result")

    def _hurry_leaving(self, number: int, rank: _Rank) -> None:
        # A rank that has reported may hang on the way out in a thread or a destructor of a library: end it.
        if not rank.reported_at:
            rank.reported_at = time.monotonic() if report_file(self.control, number).exists() else 0.0
        elif time.monotonic() - rank.reported_at > LEAVING_S:
            signal_group(rank.process.pid, signal.SIGKILL)

    def _lose(self, number: int, kind: str, what: str, number_of_signal: int | None = None) -> None:
        if self._killed and kind != "start":
            return  # by this launcher, because of something else
        path = rank_log(self.log_dir, number)
        end = last_lines(path)
        message = f"{what}; the end of {path}:\n{end}" if end else f"{what}; {path} is empty"
        self.lost.append(RankFailure(number, kind, message, number_of_signal, observed_at=time.time()))
        self._fail_soon()

    def _fail_soon(self) -> None:
        self._ask_to_stop()
        limit = time.monotonic() + self.spec.failure_grace_s
        self._kill_at = min(limit, self._kill_at or limit)

    def _decide(self) -> None:
        if self.signals.stop.is_set() and not self._asked_to_stop:
            self._ask_to_stop()
            self._kill_at = time.monotonic() + self.spec.stop_grace_s
        if self.signals.force.is_set():
            self._note_unfinished("was killed by a second Ctrl-C before it had stopped")
            self._kill()
        elif self._kill_at and time.monotonic() > self._kill_at and not self._killed:
            if not self.lost and not any(report and not report["ok"] for report in self.reports):
                self._note_unfinished(f"did not stop within {self.spec.stop_grace_s:g} s and was killed")
            self._kill()

    def _note_unfinished(self, what: str) -> None:
        if self._killed:
            return
        for number, rank in enumerate(self.ranks):
            if not rank.ended and not report_file(self.control, number).exists():
                self._lose(number, "timeout", what)

    def _ask_to_stop(self) -> None:
        self._asked_to_stop = True
        for rank in self.ranks:
            if rank.process.poll() is None and rank.process.stdin:
                try:
                    rank.process.stdin.write(b"stop\n")
                    rank.process.stdin.flush()
                except BrokenPipeError:
                    continue  # it has just ended; the next look finds out how

    def _kill(self) -> None:
        self._killed = True
        for rank in self.ranks:
            if rank.process.poll() is None:
                signal_group(rank.process.pid, signal.SIGKILL)

    def _stream(self, everything: bool = False) -> None:
        if self.tail and (text := self.tail.read(everything)):
            self.on_output(text)


def close_pipe(pipe: IO[bytes]) -> None:
    """Closes the way to a process that has ended; what it did not live to read is no error."""
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
