"""`trimtab bench loader`: tokens per second and resume time of the data stream, beside other loaders in one call."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.context import EXIT_OK
from launch.bench_energon import EnergonPeer
from launch.bench_peers import MAPPED, MappedPeer, OurStream, Peer, Shape, StreamingPeer, Tensors, WebDatasetPeer
from launch.bench_record import Spread, machine, version, write_record
from launch.output import print_json

_PACKAGES = ("torch", "numpy", "webdataset", "mosaicml-streaming", "megatron-energon", "google-crc32c")
_AIMS = (("webdataset", 1.5), *((name, 0.8) for name in MAPPED))
_RESUME_AIM = 100.0
_DTYPES = [torch.int64, torch.int64, torch.int64, torch.bool]


def run(options: argparse.Namespace) -> int:
    """Measures all loaders, prints the table and writes CSV, JSON and plot to `options.out`."""
    torch.set_num_threads(1)
    shape = Shape(options.seq_len, options.batch, options.micro_batch, options.packing)
    folder = Path(tempfile.mkdtemp(prefix="trimtab-bench-"))
    try:
        dataset = make_dataset(folder, int(options.megatokens * 1e6))
        peers, absent = _peers(dataset, folder, shape)
        rows = _measure(peers, shape, options.repeats, options.resume_samples)
        facts: dict[str, Any] = {
            "benchmark": "loader",
            "megatokens": options.megatokens,
            "seq_len": shape.seq_len,
            "batch": shape.batch,
            "micro_batch": shape.micro_batch,
            "packing": shape.packing,
            "resume_samples": options.resume_samples,
            "threads": 1,
            "absent": absent,
            "verdicts": verdicts(rows),
            "machine": machine(_PACKAGES),
        }
        if options.index_documents:
            from launch.bench_index import resume_times

            facts["index"] = resume_times(folder / "index", options.index_documents, shape.batch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(render(rows, facts))
    write_record(options.out, "loader", rows, facts)
    plot(rows, options.out / "loader.png")
    print(f"written: {options.out}/loader.csv, loader.json, loader.png")
    if options.json:
        print_json(json.loads((options.out / "loader.json").read_text(encoding="utf-8")))
    return EXIT_OK


def make_dataset(folder: Path, n_tokens: int, seed: int = 0) -> Path:
    """Packs made-up documents, of lengths spread like those of real text (log-normal, median 800 bytes), as bytes."""
    from data.pack import pack

    draw = np.random.default_rng(seed)
    words = ["".join(chr(97 + letter) for letter in draw.integers(0, 26, draw.integers(2, 9))) for _ in range(4096)]
    source = folder / "documents.jsonl"
    written = 0
    with source.open("w", encoding="utf-8") as file:
        while written < n_tokens:
            n_words = int(np.clip(draw.lognormal(4.8, 1.0), 4, 5000))
            text = " ".join(words[word] for word in draw.integers(0, len(words), n_words))
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text) + 1
    pack([str(source)], folder / "dataset", tokenizer="bytes", shard_mb=4)
    return folder / "dataset"


def _peers(dataset: Path, folder: Path, shape: Shape) -> tuple[list[Peer], dict[str, str]]:
    """The loaders that can run here, and why the others cannot."""
    peers: list[Peer] = [
        OurStream(dataset, shape, cold=True),
        OurStream(dataset, shape, cold=False),
        *(MappedPeer(dataset, folder, shape, name) for name in MAPPED),
    ]
    absent = {}
    makers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "webdataset": ("webdataset", lambda: WebDatasetPeer(dataset, shape)),
        "streaming": ("mosaicml-streaming", lambda: StreamingPeer(dataset, folder, shape)),
        "energon": ("megatron-energon", lambda: EnergonPeer(dataset, folder, shape)),
    }
    for name, (package, make) in makers.items():
        if version(package) is None:
            absent[name] = f"not installed (pip install {package})"
            continue
        try:
            peers.append(make())
        except (ImportError, RuntimeError, OSError) as error:  # a broken installation says it in many ways
            absent[name] = f"installed, cannot be imported ({error})"
    return peers, absent


def _measure(peers: list[Peer], shape: Shape, repeats: int, resume_samples: int) -> list[dict[str, Any]]:
    """Passes in turns, so that a busy moment of the machine does not hit one loader alone; after a warm-up each."""
    for peer in peers:
        peer.open()
        _rate(peer, shape)
    rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for number in range(repeats):
        for peer in peers:
            rates[peer.name].append(_rate(peer, shape))
        print(f"pass {number + 1} of {repeats}", file=sys.stderr)
    rows = []
    for peer in peers:
        peer.close()
        seconds = []
        slow = 1 if peer.name == "webdataset" else repeats  # a replay takes long and varies little
        for _ in range(slow):
            started = time.perf_counter()
            peer.resume(resume_samples)
            seconds.append(time.perf_counter() - started)
        row = {"loader": peer.name, "version": version(peer.package) or "", "note": peer.note}
        rows.append({**row, "tokens_per_second": Spread.of(rates[peer.name]), "resume_seconds": Spread.of(seconds)})
    return rows


def _rate(peer: Peer, shape: Shape) -> float:
    """Targets per second of one pass; its first micro-batch is checked for shapes and dtypes."""
    n_tokens = 0
    started = time.perf_counter()
    for micro in peer.micro_batches():
        if n_tokens == 0:
            _check(peer.name, micro, shape)
        n_tokens += micro[1].numel()
    return n_tokens / (time.perf_counter() - started)


def _check(name: str, micro: Tensors, shape: Shape) -> None:
    expected = (shape.micro_batch, shape.seq_len)
    if any(tuple(tensor.shape) != expected for tensor in micro):
        raise ValueError(f"{name} gave {[tuple(tensor.shape) for tensor in micro]} instead of {expected}")
    if [tensor.dtype for tensor in micro] != _DTYPES[: len(micro)]:
        raise ValueError(f"{name} gave {[tensor.dtype for tensor in micro]}")


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How our later passes compare with each aim, as sentences."""
    by_name = {row["loader"]: row for row in rows}
    found = []
    for ours in ("trimtab, first pass", "trimtab"):
        for name, aim in _AIMS:
            if name in by_name:
                ratio = by_name[ours]["tokens_per_second"].median / by_name[name]["tokens_per_second"].median
                said = "reached" if ratio >= aim else "NOT reached"
                found.append(f"{ours}: {ratio:.2f} times {name} (aim {aim}: {said})")
    if "webdataset" in by_name:
        ratio = by_name["webdataset"]["resume_seconds"].median / by_name["trimtab"]["resume_seconds"].median
        said = "reached" if ratio >= _RESUME_AIM else "NOT reached"
        found.append(f"resume {ratio:.0f} times faster than webdataset's replay (aim {_RESUME_AIM:.0f}: {said})")
    return found


def render(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table, what is absent, the verdicts and the machine, as text."""
    where = facts["machine"]
    lines = [
        f"{facts['megatokens']:g} million tokens, seq_len {facts['seq_len']}, micro-batches of {facts['micro_batch']}, "
        f"packing {facts['packing']}; {where['processor']}, {where['cores']} cores (load {where['load']}), one thread",
        f"{'loader':<25}{'Mtokens/s':>10}{'least':>8}{'most':>8}{'resume s':>11}  note",
    ]
    for row in rows:
        rate, resume = row["tokens_per_second"], row["resume_seconds"]
        lines.append(
            f"{row['loader']:<25}{rate.median / 1e6:>10.1f}{rate.least / 1e6:>8.1f}{rate.greatest / 1e6:>8.1f}"
            f"{resume.median:>11.4f}  {row['note']}"
        )
    lines += [f"{name:<25}{reason}" for name, reason in facts["absent"].items()]
    lines += facts["verdicts"]
    if "index" in facts:
        lines += [str(line) for line in facts["index"]["lines"]]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second (with least and greatest) and of resume time, log scale; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [row["loader"] for row in rows]
    for axis, key, title, scale in (
        (left, "tokens_per_second", "million tokens per second", 1e-6),
        (right, "resume_seconds", "resume, seconds", 1.0),
    ):
        spreads = [row[key] for row in rows]
        medians = np.array([spread.median for spread in spreads]) * scale
        errors = np.array([[s.median - s.least for s in spreads], [s.greatest - s.median for s in spreads]]) * scale
        colours = ["tab:blue" if name.startswith("trimtab") else "tab:gray" for name in names]
        axis.barh(names, medians, xerr=errors, color=colours)
        axis.set_title(title)
        axis.invert_yaxis()
    right.set_xscale("log")
    figure.savefig(path, dpi=120)
