"""`trimtab bench NAME`: each benchmark runs its peers in the same call and prints a table."""

import argparse
from pathlib import Path
from typing import Any


def add_bench_commands(commands: Any) -> None:
    """Adds the `bench` command and its benchmarks to a parser's subcommands."""
    bench = commands.add_parser("bench", help="Measure, beside others in the same call.")
    names = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    _add_loader(names)


def _add_loader(names: Any) -> None:
    loader = names.add_parser(
        "loader",
        help="tokens/s and resume time of the data stream beside other loaders",
        description="Reads the same synthetic documents with this project's stream and with others: webdataset, "
        "MosaicML streaming and Energon where they are installed, memory-mapped tokens. Each gives batches of "
        "the same shape, int64 torch tensors of tokens and targets, in one process.",
        epilog="example: trimtab bench loader --megatokens 50 --seq-len 2048 --repeats 5 --out runs/bench-loader",
    )
    loader.add_argument("--megatokens", type=float, default=8, help="size of the data, in million tokens (default: 8)")
    loader.add_argument("--seq-len", type=int, default=1024, help="targets in a sequence (default: 1024)")
    loader.add_argument("--batch", type=int, default=64, help="sequences in a step (default: 64)")
    loader.add_argument("--micro-batch", type=int, default=8, help="sequences in a tensor (default: 8)")
    loader.add_argument("--packing", choices=("split", "best_fit"), default="split")
    loader.add_argument("--repeats", type=int, default=5, help="timed passes over the data (default: 5)")
    loader.add_argument(
        "--resume-samples", type=int, default=100_000, help="documents read before the resume (default: 100000)"
    )
    loader.add_argument(
        "--index-documents", type=int, default=0,
        help="also time the resume on a synthetic index of so many documents, for example 10000000 (default: 0, not)",
    )  # fmt: skip
    loader.add_argument("--out", type=Path, default=Path("runs/bench-loader"), help="folder for CSV, JSON and plot")
    loader.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    loader.set_defaults(run_command=_run_loader)


def _run_loader(options: argparse.Namespace) -> int:
    from launch.bench_loader import run

    return run(options)
