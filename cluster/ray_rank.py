"""One rank inside a Ray actor: runs the entry in a thread and answers questions beside it."""

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from cluster.context import RankContext
from cluster.entry import prepare_environment, run_entry, thread_count
from cluster.flag import StopFlag
from cluster.logs import LogTail, redirect_output
from cluster.monitor import start_monitor, stop_monitor
from cluster.ports import PortHold, interface_of

LOOKS = 3  # a network's file system may show a new file late
LOOK_AGAIN_S = 1.0


def folder_problem(proof: Path) -> str:
    """What is wrong on this machine with the folder of a file that another one wrote, "" when nothing is."""
    for look in range(LOOKS):
        if proof.exists():
            return "" if os.access(proof.parent, os.W_OK | os.X_OK) else "may not write {folder}"
        if not proof.parent.exists():
            break
        if look + 1 < LOOKS:
            time.sleep(LOOK_AGAIN_S)
    return "does not see {folder}"


class RankActor:
    """A worker without a rank at first; `begin` gives it one. Created with max_restarts=0 and max_concurrency > 1."""

    def __init__(self) -> None:
        self._stop = StopFlag()
        self._report: dict | None = None
        self._port: PortHold | None = None
        self._tail: LogTail | None = None
        self._thread: threading.Thread | None = None

    def where(self, proofs: list[str]) -> dict:
        """This worker's place. proofs: files that the driver wrote; "missing" says what is wrong with each folder."""
        import ray

        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "missing": [folder_problem(Path(proof)) for proof in proofs],
        }

    def hold_port(self, host: str) -> str:
        """Keeps a port for the rendezvous; returns its tcp:// address."""
        self._port = PortHold(host)
        return self._port.address

    def begin(
        self,
        entry: str,
        payload_text: str,
        context_text: str,
        threads: int,
        log_file: str,
        append: bool,
        watch: dict | None = None,
    ) -> str:
        """Starts the entry as the rank in context_text, whose interface "auto" means that of this node's address.

        log_file "" keeps the output in a file of this node, from where `poll` hands it over. watch: for the monitor,
        from `monitor.new_watch`. Returns the log's path.
        """
        import ray

        fields = json.loads(context_text)
        if fields["interface"] == "auto":
            fields["interface"] = interface_of(ray.util.get_node_ip_address())
        fields["stop"] = self._stop
        context = RankContext(**fields)
        prepare_environment(os.environ, context, thread_count(threads, context.local_world_size))
        if "torch" in sys.modules:  # something at this worker's start imported it before the variables were set
            sys.modules["torch"].set_num_threads(thread_count(threads, context.local_world_size))
        path = log_file or tempfile.mkstemp(prefix=f"trimtab-rank-{context.rank}-", suffix=".log")[1]
        redirect_output(path, append)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"[{now}] rank {context.rank}: process {os.getpid()} on {os.uname().nodename}")
        if not log_file:
            self._tail = LogTail(Path(path))
        if self._port:
            self._port.hand_over()
        self._thread = threading.Thread(
            target=self._run, args=(entry, payload_text, context, watch), name=f"rank-{context.rank}", daemon=True
        )
        self._thread.start()
        return path

    def poll(self) -> dict:
        """{"report": the entry's report or None, "text": new output where this node keeps the log, else ""}."""
        report = self._report  # read before the output, so that a finished rank's output is complete
        text = self._tail.read(everything=report is not None) if self._tail else ""
        if self._tail and report is not None:
            self._tail.path.unlink(missing_ok=True)  # all of it is handed over; after a crash it stays to be looked at
        return {"report": report, "text": text}

    def stop(self) -> None:
        """Asks the entry to stop."""
        self._stop.set()

    def stacks(self) -> str:
        """Where every thread of this process is right now."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read().decode("utf-8", errors="replace")

    def _run(self, entry: str, payload_text: str, context: RankContext, watch: dict | None) -> None:
        monitor = start_monitor(watch, context)
        report = run_entry(entry, payload_text, context)
        stop_monitor(monitor)
        if not report["ok"]:
            print(report["error"], file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._report = report
