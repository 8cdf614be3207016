"""Fresh processes for one measurement of a benchmark: starts them, brings back what each returned. Also their program:

python -m launch.bench_ranks MODULE:FUNCTION FOLDER RANK RANKS      (FOLDER holds job.json)
"""

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_STATUS = Path("/proc/self/status")


class RankError(RuntimeError):
    """A process of the measurement failed; the message is its last line, `log` all that it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def run_ranks(function: str, job: dict[str, Any], n_ranks: int, timeout_s: float = 900) -> list[Any]:
    """Calls `module:function(job, rank, n_ranks)` in new processes that are joined through Gloo.

    Args:
        function: its result must be JSON-able.
        job: JSON-able. "threads": of each process (1 where absent, null for what torch takes by itself).
            "keep_freed_memory": false for the C library's own allocator settings, not launch/allocator.py's.
            "products": true for fp32 products as our training has them (kernels/products.py), torch's own where absent.

    Returns:
        The results by rank.

    Raises:
        RankError: one failed or did not end in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="trimtab-bench-"))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    wanted = job.get("threads", 1)
    threads = {} if wanted is None else dict.fromkeys(names, str(wanted))
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**inherited, **threads, **quiet, "PYTHONPATH": path}
    (folder / "job.json").write_text(json.dumps(job))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(n_ranks):
            command = [sys.executable, "-m", "launch.bench_ranks", function, str(folder), str(rank), str(n_ranks)]
            with (folder / f"log-{rank}").open("w") as log:
                processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed:
                break
            if time.monotonic() > deadline:
                raise RankError(f"not done after {timeout_s:.0f} s", _log(folder, 0))
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed:
            said = _log(folder, failed[0])
            raise RankError((said.strip().splitlines() or ["no word"])[-1], said)
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(n_ranks)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _log(folder: Path, rank: int) -> str:
    return (folder / f"log-{rank}").read_text(errors="replace")


class PeakMemory:
    """How far this process's resident memory rises above where it was, MiB; None where the system does not say."""

    def __init__(self) -> None:
        self._before = None
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # what was freed goes back to the system: room that is used again must count again
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self._before = _resident("VmRSS")
        except OSError:
            pass  # not Linux, or not allowed

    def mib(self) -> float | None:
        """The rise of the peak since the start."""
        peak = None if self._before is None else _resident("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / 1024


def _resident(key: str) -> int | None:
    """A line of /proc/self/status, KiB."""
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _main(function: str, folder: Path, rank: int, n_ranks: int) -> None:
    import torch

    from kernels.products import choose_products
    from launch.allocator import keep_freed_memory
    from parallel.ranks import join_process_group

    job = json.loads((folder / "job.json").read_text())
    if (threads := job.get("threads", 1)) is not None:
        torch.set_num_threads(threads)
    if job.get("keep_freed_memory", True):  # the same for whoever is measured
        keep_freed_memory()
    if job.get("products", False):
        choose_products()
    module, _, name = function.partition(":")
    join_process_group(f"file://{folder}/rendezvous", rank, n_ranks, "gloo", 600, None)
    result = getattr(importlib.import_module(module), name)(job, rank, n_ranks)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()


if __name__ == "__main__":
    try:
        _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except BaseException:  # noqa: BLE001  said in full, and the rank's exit status tells the parent
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # DeepSpeed's exit handlers talk about groups that are gone
