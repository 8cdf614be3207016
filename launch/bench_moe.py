"""`trimtab bench moe`: one expert layer, forward and backward, ours beside the peers', in one call."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.context import EXIT_OK
from launch.bench_moe_layers import WAYS, LayerShape
from launch.bench_moe_rank import ROUTINGS
from launch.bench_ranks import RankError, run_ranks
from launch.bench_record import Spread, machine, version, write_record
from launch.config import ConfigError, section_problems
from launch.output import print_json

PACKAGES = ("torch", "numpy", "deepspeed", "transformers")
OURS = "trimtab"
_ERROR_LIMIT = 1e-4  # of fp32 products against float64 ones; what lies above it computes something else


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables and writes CSV, JSON and plot to `options.out`."""
    shape = LayerShape(options.batch, options.seq_len, options.hidden, options.width, options.experts, options.top_k)
    ways = chosen_ways(options.only, WAYS)
    check_shape(shape, options.ranks)
    present, absent = installed(ways, {name: WAYS[name].packages for name in ways})
    found = _measure(shape, present, options.ranks, options.repeats, options.inner, absent)
    rows = table_rows(found)
    facts: dict[str, Any] = {
        "benchmark": "moe", **asdict(shape), "ranks": options.ranks, "repeats": options.repeats,
        "runs_each": options.inner, "threads_per_rank": 1, "absent": absent, "machine": machine(PACKAGES),
    }  # fmt: skip
    print(render(rows, facts))
    write_record(options.out, "moe", rows, facts)
    plot(rows, options.out / "moe.png")
    print(f"written: {options.out}/moe.csv, moe.json, moe.png")
    if options.json:
        print_json(json.loads((options.out / "moe.json").read_text(encoding="utf-8")))
    return EXIT_OK


def chosen_ways(only: str | None, known: Mapping[str, object]) -> list[str]:
    """The ways to measure: those named with semicolons between, or all.

    Raises:
        ConfigError: a name that is none.
    """
    wanted = [name.strip() for name in only.split(";")] if only else list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError([f"--only: there is no way {name!r}; use {'; '.join(known)}" for name in unknown])
    return wanted


def check_shape(shape: LayerShape, ranks: Sequence[int]) -> None:
    """Raises ConfigError for a shape that cannot be spread or drawn."""
    found = section_problems(shape.model(), "model")
    found += [f"--ranks {n}: {shape.experts} experts cannot be dealt to so many" for n in ranks if shape.experts % n]
    if shape.hidden < shape.experts:
        found.append(f"--hidden {shape.hidden} must be at least --experts {shape.experts}: tokens are made to fit")
    if found:
        raise ConfigError(found)


def installed(ways: Sequence[str], packages: Mapping[str, Sequence[str]]) -> tuple[list[str], dict[str, str]]:
    """The ways that can run here, and why each other cannot."""
    present, absent = [], {}
    for name in ways:
        missing = [package for package in packages[name] if version(package) is None]
        if missing:
            absent[name] = f"left out: not installed (pip install {' '.join(missing)})"
        else:
            present.append(name)
    return present, absent


def _measure(
    shape: LayerShape, ways: Sequence[str], ranks: Sequence[int], repeats: int, inner: int, absent: dict[str, str]
) -> dict[tuple[int, str], list[list[dict[str, Any]]]]:
    """By ranks and way, what each repeat's fresh processes said; ways in turns, so that a busy moment hits all."""
    found: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
    for number in range(repeats):
        for n_ranks in ranks:
            for name in ways:
                job = {"way": name, "shape": asdict(shape), "inner": inner}
                try:
                    results = run_ranks("launch.bench_moe_rank:measure", job, n_ranks)
                except RankError as error:
                    if name == OURS:
                        print(error.log, file=sys.stderr)
                        raise
                    absent[f"{name}, {ranks_word(n_ranks)}"] = f"failed: {error}"
                    continue
                found.setdefault((n_ranks, name), []).append(results[0])
            print(f"repeat {number + 1} of {repeats}, {ranks_word(n_ranks)}", file=sys.stderr, flush=True)
    return found


def ranks_word(n_ranks: int) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{n_ranks} rank" + "s" * (n_ranks > 1)


def table_rows(found: Mapping[tuple[int, str], Sequence[Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each number of ranks, routing and way: spreads over repeats, worst error, most memory.

    Args:
        found: by (ranks, way) a list of repeats, each the list that bench_moe_rank.measure returns.
    """
    rows = []
    for (n_ranks, name), repeats in found.items():
        for place, routing in enumerate(ROUTINGS):
            runs = [repeat[place] for repeat in repeats]
            exposed = [run["exposed"] for run in runs if run["exposed"] is not None]
            peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
            rows.append({
                "ranks": n_ranks, "routing": routing, "way": name,
                **{key: Spread.of([run[key] for run in runs]) for key in ("seconds", "forward", "backward")},
                "exposed": Spread.of(exposed) if exposed else None,
                "peak_mib": max(peaks, default=None),
                "output_error": max(run["output_error"] for run in runs),
                "gradient_error": max(run["gradient_error"] for run in runs),
                "busiest_over_mean": runs[0]["busiest_over_mean"],
            })  # fmt: skip
    return [{**row, "of_ours": _of_ours(row, rows)} for row in rows]


def _of_ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """This way's time over ours, of medians; None where ours was not measured."""
    key = (row["ranks"], row["routing"], OURS)
    ours = next((one for one in rows if (one["ranks"], one["routing"], one["way"]) == key), None)
    return None if ours is None else row["seconds"].median / ours["seconds"].median


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The tables, what is absent, and the machine, as text."""
    where = facts["machine"]
    lines = [
        f"one expert layer, forward and backward; each rank {facts['batch']} x {facts['seq_len']} tokens of "
        f"{facts['hidden']} fp32, {facts['experts']} experts of width {facts['width']}, top-{facts['top_k']}, one "
        f"shared; medians of {facts['repeats']} repeats in fresh processes, {facts['runs_each']} runs each",
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), one thread a rank; "
        + ", ".join(f"{name} {found}" for name, found in where["packages"].items() if found),
    ]
    for n_ranks in dict.fromkeys(row["ranks"] for row in rows):
        for routing in ROUTINGS:
            chosen = [row for row in rows if (row["ranks"], row["routing"]) == (n_ranks, routing)]
            spread = "" if n_ranks == 1 else "; transformers has every expert on each rank and sends nothing"
            lines.append(
                f"{ranks_word(n_ranks)}, {routing} routing (busiest expert {chosen[0]['busiest_over_mean']:.2f} times "
                f"the mean){spread}"
            )
            lines.append(
                f"{'way':<26}{'ms':>8}{'least':>8}{'most':>8}{'forward':>9}{'exposed':>9}{'of ours':>9}{'MiB':>8}"
                f"{'error out':>11}{'error dx':>10}"
            )
            lines += [_line(row) for row in sorted(chosen, key=lambda row: row["seconds"].median)]
    lines += [f"{name}: {reason}" for name, reason in facts["absent"].items()]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    took = row["seconds"]
    exposed = "" if row["exposed"] is None else f"{row['exposed'].median * 1e3:.1f}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    ratio = "" if row["of_ours"] is None else f"{row['of_ours']:.2f}"
    wrong = "  WRONG" if max(row["output_error"], row["gradient_error"]) > _ERROR_LIMIT else ""
    return (
        f"{row['way']:<26}{took.median * 1e3:>8.1f}{took.least * 1e3:>8.1f}{took.greatest * 1e3:>8.1f}"
        f"{row['forward'].median * 1e3:>9.1f}{exposed:>9}{ratio:>9}{peak:>8}{row['output_error']:>11.1e}"
        f"{row['gradient_error']:>10.1e}{wrong}"
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of time, forward darker, a panel for each number of ranks and routing; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    ranks = list(dict.fromkeys(row["ranks"] for row in rows))
    figure = Figure(figsize=(11, 0.8 + 2.6 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ranks), 2, sharex="row", sharey=True, squeeze=False)
    for line, n_ranks in zip(panels, ranks, strict=True):
        for axis, routing in zip(line, ROUTINGS, strict=True):
            chosen = [row for row in rows if (row["ranks"], row["routing"]) == (n_ranks, routing)]
            names = [row["way"] for row in chosen]
            took = [row["seconds"] for row in chosen]
            least = [(one.median - one.least) * 1e3 for one in took]
            most = [(one.greatest - one.median) * 1e3 for one in took]
            colours = ["tab:blue" if name == OURS else "tab:gray" for name in names]
            axis.barh(names, [one.median * 1e3 for one in took], xerr=[least, most], color=colours, alpha=0.5)
            axis.barh(names, [row["forward"].median * 1e3 for row in chosen], height=0.4, color=colours)
            axis.set_title(f"{ranks_word(n_ranks)}, {routing} routing", loc="left", fontsize=10)
    panels[0][0].invert_yaxis()  # the others share it
    for axis in panels[-1]:
        axis.set_xlabel("ms, forward (dark) and backward; lines from least to most")
    figure.savefig(path, dpi=120)
