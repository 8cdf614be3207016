"""`trimtab bench kernels`: each kernel beside its reference, torch's own and Liger's, in one call."""

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.context import EXIT_OK
from kernels.measured import keep_in
from launch.bench_kernel_cases import CPU, GPU, OPERATIONS, Case, Sizes, cases
from launch.bench_record import Spread, machine, version, write_record
from launch.config import ConfigError
from launch.output import print_json
from launch.peak import peak_flops

_PACKAGES = ("torch", "triton", "numpy", "liger-kernel")
_MEMORY_AIM, _TIME_AIM = 4.0, 1.15
# Smaller changes of a process's resident memory say nothing.
_HIDDEN = 32 * 2**20
_PASSES = ("forward", "forward and backward")


def run(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes CSV, JSON and plot to `options.out`."""
    device = _device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    if options.cache:
        keep_in(options.cache)
    sizes = _sizes(options, device)
    asked = options.only.split(",") if options.only else [""]
    if missing := [part for part in asked if not any(part in op for op in OPERATIONS)]:
        raise ConfigError(
            [f"--only {','.join(missing)}: no such kernel; use {', '.join(OPERATIONS)}, or parts of them"]
        )
    rows: list[dict[str, Any]] = []
    for case in cases(sizes, device, dtype):
        if any(part in case.op for part in asked):
            rows += measure(case, device, options.repeats)
    peak, source = peak_flops(device, "bf16" if dtype == torch.bfloat16 else "fp32")
    liger = version("liger-kernel")
    facts: dict[str, Any] = {
        "benchmark": "kernels",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peak_flops": peak,
        "peak_source": source,
        "absent": absent(device, liger),
        "verdicts": verdicts(rows),
        "machine": machine(_PACKAGES),
    }
    print(render(rows, facts))
    write_record(options.out, "kernels", rows, facts)
    plot(rows, options.out / "kernels.png")
    print(f"written: {options.out}/kernels.csv, kernels.json, kernels.png")
    if options.json:
        print_json(json.loads((options.out / "kernels.json").read_text(encoding="utf-8")))
    return EXIT_OK


def measure(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case: its peers in turns, so that a busy moment does not hit one alone, after a warm-up each."""
    rows = []
    for number, name in enumerate(_PASSES[: 2 if case.backward else 1]):
        calls = {peer: _call(case, op, backward=number == 1) for peer, op in case.peers.items()}
        peaks: dict[str, int | None] = {}
        for peer, call in calls.items():
            call()  # compiles, tunes, warms caches
            peaks[peer] = peak_bytes(call, device)
        seconds: dict[str, list[float]] = {peer: [] for peer in calls}
        for _ in range(repeats):
            for peer, call in calls.items():
                seconds[peer].append(_seconds(call, device))
        for peer in calls:
            spread = Spread.of(seconds[peer])
            peak = peaks[peer]
            rows.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "routing": case.routing,
                    "pass": name,
                    "backend": peer,
                    "seconds": spread,
                    "peak_mib": None if peak is None else peak / 2**20,
                    "tflops": case.flops[number] / spread.median / 1e12 or None,
                    "gb_per_s": case.bytes[number] / spread.median / 1e9 or None,
                }
            )
        print(f"{case.op} {case.routing} {name}", file=sys.stderr)
    return rows


def _call(case: Case, op: Callable[..., Tensor], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return op(*case.inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in case.inputs]

    def both() -> object:
        out = op(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call holds beyond what was held before, results included; None where it cannot be known.

    On a GPU the allocator's peak. On Linux the process's peak resident memory, whose mark can be reset; less than
    _HIDDEN is not told.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # freed pieces that glibc keeps would hide as much of what the call takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        grown = _status("VmHWM") - before
        return grown if grown >= _HIDDEN else None
    except OSError:
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How the cross-entropy compares with whole logits, and the experts with torch's composite, as sentences."""
    by_key = {(row["op"], row["routing"], row["pass"], row["backend"]): row for row in rows}
    found = []
    for (op, routing, passed, backend), row in by_key.items():
        if not backend.startswith("trimtab") or passed != _PASSES[1]:
            continue
        if op == "linear_cross_entropy":
            whole = by_key[op, routing, passed, "torch whole logits"]
            ratio = row["seconds"].median / whole["seconds"].median
            said = "reached" if ratio <= _TIME_AIM else "NOT reached"
            found.append(f"{backend} {op}: {ratio:.2f} times the time of whole logits (aim {_TIME_AIM}: {said})")
            if row["peak_mib"] and whole["peak_mib"]:
                less = whole["peak_mib"] / row["peak_mib"]
                said = "reached" if less >= _MEMORY_AIM else "NOT reached"
                aim = f"gradients included (aim {_MEMORY_AIM:g}: {said})"
                found.append(f"{backend} {op}: {less:.1f} times less peak memory, {aim}")
        if op == "experts_mlp":
            ratio = by_key[op, routing, passed, "torch grouped_mm"]["seconds"].median / row["seconds"].median
            found.append(
                f"{backend} {op}, {routing} routing: {ratio:.2f} times as fast as torch's grouped_mm composite"
            )
    return found


def absent(device: torch.device, liger: str | None) -> dict[str, str]:
    """Peers that did not run, and why."""
    found = {}
    if device.type != "cuda":
        found["trimtab triton"] = "needs a GPU (in the interpreter it is right, and slow)"
        found["liger"] = "needs a GPU"
    elif liger is None:
        found["liger"] = "not installed (pip install liger-kernel)"
    return found


def render(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, what is absent, the verdicts and the machine, as text."""
    where = facts["machine"]
    on = facts["device"] if facts["device"] != "cpu" else f"{where['processor']}, {facts['threads']} thread(s)"
    lines = [
        f"{on}, {facts['dtype']}, load {where['load']}, torch {where['packages']['torch']}, "
        f"triton {where['packages']['triton']}; peak {facts['peak_flops'] / 1e12:.3g} TFLOP/s ({facts['peak_source']})",
        f"{'backend':<22}{'routing':<9}{'pass':<21}{'ms':>10}{'least':>10}{'most':>10}{'TFLOP/s':>9}{'GB/s':>8}{'MiB':>8}",
    ]
    title = ""
    for row in rows:
        if (now := f"{row['op']}  {row['shape']}") != title:
            title = now
            lines.append(title)
        spread = row["seconds"]
        times = "".join(f"{value * 1e3:>10.3f}" for value in (spread.median, spread.least, spread.greatest))
        rates = _cell(row["tflops"], 9, ".3g") + _cell(row["gb_per_s"], 8, ".3g") + _cell(row["peak_mib"], 8, ".0f")
        lines.append(f"  {row['backend']:<20}{row['routing']:<9}{row['pass']:<21}{times}{rates}")
    lines += [f"{name:<22}{reason}" for name, reason in facts["absent"].items()]
    return "\n".join(lines + facts["verdicts"])


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: each peer's time relative to our fastest backend, forward and backward; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["pass"] == _PASSES[1] or row["op"] == "quantize_rows":
            groups.setdefault(f"{row['op']} {row['routing']}".strip(), []).append(row)
    figure = Figure(figsize=(9, 1.2 + 0.28 * sum(len(group) + 1 for group in groups.values())), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    place, labels = 0, []
    for name, group in groups.items():
        ours = min(row["seconds"].median for row in group if row["backend"].startswith("trimtab"))
        for row in group:
            own = row["backend"].startswith("trimtab")
            axis.barh(place, row["seconds"].median / ours, color="tab:blue" if own else "tab:gray")
            labels.append((place, f"{name}: {row['backend']}"))
            place += 1
        place += 1
    axis.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("time, forward and backward, relative to this project's fastest backend (less is faster)")
    figure.savefig(path, dpi=120)


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["--device cuda: this machine has no GPU that torch can use; use --device cpu"])
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)


def _sizes(options: argparse.Namespace, device: torch.device) -> Sizes:
    sizes = GPU if device.type == "cuda" else CPU
    names = ("tokens", "hidden", "width", "experts", "top_k", "vocab", "vocab_tokens", "vocab_hidden")
    return replace(sizes, **{name: getattr(options, name) for name in names if getattr(options, name) is not None})
