"""`trimtab bench step`: whole training steps, ours beside DeepSpeed's AutoEP and data-parallel transformers."""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.context import EXIT_OK
from launch.bench_moe import OURS, PACKAGES, chosen_ways, installed
from launch.bench_ranks import RankError, run_ranks
from launch.bench_record import Spread, machine, write_record
from launch.bench_step_rank import ROUTINGS
from launch.bench_step_ways import WAYS, StepShape
from launch.config import ConfigError, layout_problems
from launch.output import print_json
from model.count import count_parameters

_FIRST_LOSS_LIMIT = 1e-5  # relative; the same function of the same weights in fp32


def run(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes CSV, JSON and plot to `options.out`."""
    shape = StepShape(
        options.batch, options.seq_len, options.hidden, options.width, options.experts, options.top_k, options.layers,
        options.vocab,
    )  # fmt: skip
    config = shape.config("made", options.ranks, 1, options.ranks)
    problems = config.problems() or layout_problems(config, "local", options.ranks)
    if problems:
        raise ConfigError(problems)
    present, absent = installed(chosen_ways(options.only, WAYS), {name: way.packages for name, way in WAYS.items()})
    folder = Path(tempfile.mkdtemp(prefix="trimtab-bench-"))
    try:
        found, profile = _measure(shape, present, options, folder, absent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = table_rows(found, shape.batch * shape.seq_len * options.ranks)
    facts: dict[str, Any] = {
        "benchmark": "step", **asdict(shape), "ranks": options.ranks, "repeats": options.repeats,
        "steps": options.steps, "warm_up": options.warm_up, "threads_per_rank": options.threads, "zero_stage": 1,
        "parameters": count_parameters(shape.model()).total, "absent": absent, "profile": profile,
        "verdicts": verdicts(rows), "machine": machine(PACKAGES),
    }  # fmt: skip
    print(render(rows, facts))
    write_record(options.out, "step", rows, facts)
    plot(rows, options.out / "step.png")
    print(f"written: {options.out}/step.csv, step.json, step.png")
    if options.json:
        print_json(json.loads((options.out / "step.json").read_text(encoding="utf-8")))
    return EXIT_OK


def make_dataset(folder: Path, shape: StepShape, n_sequences: int) -> Path:
    """One long made-up document, packed as bytes: transformers is given no document mask, so no step may need one."""
    from data.pack import pack

    draw = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in draw.integers(0, 26, draw.integers(2, 9))) for _ in range(4096)]
    wanted = (n_sequences + 2) * (shape.seq_len + 1)
    text = " ".join(words[word] for word in draw.integers(0, len(words), wanted // 3))
    source = folder / "document.jsonl"
    source.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return pack([str(source)], folder / "data", tokenizer="bytes").path


def _measure(
    shape: StepShape, ways: Sequence[str], options: argparse.Namespace, folder: Path, absent: dict[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]] | None]:
    """What rank 0 of each repeat said, by way, ways in turns; and our profile."""
    each = options.steps + options.warm_up
    data = make_dataset(folder, shape, 3 * each * shape.batch * options.ranks)
    found: dict[str, list[dict[str, Any]]] = {}
    profile = None
    for number in range(options.repeats):
        for name in ways:
            job = {
                "way": name, "shape": asdict(shape), "data": str(data), "run": str(folder / f"{name}-{number}"),
                "warm_up": options.warm_up, "steps": options.steps, "keep_freed_memory": WAYS[name].tuned,
                "products": WAYS[name].products,
                "threads": WAYS[name].threads(options.threads, options.ranks),
                "profile": options.profile and name == OURS and number == options.repeats - 1,
            }  # fmt: skip
            try:
                result = run_ranks("launch.bench_step_rank:measure", job, options.ranks)[0]
            except RankError as error:
                if name == OURS:
                    print(error.log, file=sys.stderr)
                    raise
                absent[name] = f"failed: {error}"
                continue
            found.setdefault(name, []).append(result)
            profile = result["profile"] or profile
            print(f"repeat {number + 1} of {options.repeats}: {name}", file=sys.stderr, flush=True)
    return found, profile


def table_rows(found: Mapping[str, Sequence[Mapping[str, Any]]], n_tokens: int) -> list[dict[str, Any]]:
    """A row for each routing and way: spreads over all timed steps of all repeats.

    Args:
        found: by way a list of repeats, each what bench_step_rank.measure returns.
        n_tokens: of a step, over all ranks.
    """
    rows = []
    for place, routing in enumerate(ROUTINGS):
        for name, repeats in found.items():
            runs = [repeat["routings"][place] for repeat in repeats]
            seconds = [one for run in runs for one in run["seconds"]]
            exposed = [one for run in runs for one in run["exposed"]]
            peaks = [repeat["peak_mib"] for repeat in repeats if repeat["peak_mib"] is not None]
            rows.append({
                "routing": routing, "way": name,
                "tokens_per_second": Spread.of([n_tokens / one for one in seconds]),
                "seconds": Spread.of(seconds), "exposed": Spread.of(exposed) if exposed and any(exposed) else None,
                "peak_mib": max(peaks, default=None), "first_loss": repeats[0]["routings"][0]["losses"][0],
                "last_loss": runs[0]["losses"][-1],
            })  # fmt: skip
    return [{**row, "ours_over_it": _ours_over(row, rows)} for row in rows]


def _ours_over(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Our tokens a second over this way's, of medians, ours as launched beside those that are; None where that was not
    measured."""
    name = f"{OURS} as launched" if _launched(row["way"]) else OURS
    ours = next((one for one in rows if (one["routing"], one["way"]) == (row["routing"], name)), None)
    return None if ours is None else ours["tokens_per_second"].median / row["tokens_per_second"].median


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether all began with the same loss, and how ours compares with each way, as sentences."""
    if not rows:
        return []
    firsts = {row["way"]: row["first_loss"] for row in rows}
    low, high = min(firsts.values()), max(firsts.values())
    if high - low <= _FIRST_LOSS_LIMIT * high:
        said = f"all ways start with the same loss, {low:.6f}"
    else:
        said = "the ways do NOT start with the same loss: " + ", ".join(f"{k} {v:.6f}" for k, v in firsts.items())
    compared = [row for row in rows if row["ours_over_it"] is not None and not row["way"].startswith(OURS)]
    return [
        said,
        *(
            f"{row['routing']} routing: {OURS} has {row['ours_over_it']:.2f} times the tokens/s of {row['way']}"
            for row in compared
        ),
    ]


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The table, verdicts, what is absent, the machine and the profile, as text."""
    where = facts["machine"]
    lines = [
        f"training step on {facts['ranks']} processes, {facts['batch']} x {facts['seq_len']} tokens each; hidden "
        f"{facts['hidden']}, {facts['layers']} layers, {facts['experts']} experts of width {facts['width']} top-"
        f"{facts['top_k']}, vocabulary {facts['vocab']}: {facts['parameters'] / 1e6:.1f} million parameters, fp32, "
        f"AdamW; {facts['repeats']} repeats in fresh processes of {facts['steps']} steps",
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), threads of a rank "
        f"{facts['threads_per_rank']}, Gloo over loopback; "
        + ", ".join(f"{name} {found}" for name, found in where["packages"].items() if found),
        f"{'way':<26}{'tokens/s':>9}{'least':>8}{'most':>8}{'ours/it':>9}{'exposed ms':>11}{'MiB':>7}"
        f"{'first loss':>12}{'last loss':>11}",
    ]
    ordered = sorted(
        rows,
        key=lambda row: (
            _launched(row["way"]), ROUTINGS.index(row["routing"]), -row["tokens_per_second"].median,
        ),
    )  # fmt: skip
    part = None
    for row in ordered:
        if (_launched(row["way"]), row["routing"]) != part:
            part = (_launched(row["way"]), row["routing"])
            lines.append(_heading(part[0], part[1], facts["threads_per_rank"]))
        rate = row["tokens_per_second"]
        ratio = "" if row["ours_over_it"] is None else f"{row['ours_over_it']:.2f}"
        exposed = "" if row["exposed"] is None else f"{row['exposed'].median * 1e3:.0f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(
            f"{row['way']:<26}{rate.median:>9.0f}{rate.least:>8.0f}{rate.greatest:>8.0f}{ratio:>9}"
            f"{exposed:>11}{peak:>7}{row['first_loss']:>12.6f}{row['last_loss']:>11.6f}"
        )
    lines += [*facts["verdicts"], *(f"{name}: {reason}" for name, reason in facts["absent"].items())]
    if facts["profile"]:
        lines.append(f"{'our step, by operation':<60}{'calls':>8}{'ms':>9}{'share':>8}")
        lines += [
            f"{one['operation'][:59]:<60}{one['calls']:>8.0f}{one['ms']:>9.1f}{one['share']:>8.1%}"
            for one in facts["profile"]
        ]
    return "\n".join(lines)


def _launched(way: str) -> bool:
    return way in WAYS and WAYS[way].as_launched


def _heading(launched: bool, routing: str, threads: int) -> str:
    """Over the rows that are to be read together."""
    if launched:
        return (
            f"{routing} routing, as launched: ours with the cores shared out among ranks, peers with what torch and "
            "the C library do by themselves"
        )
    return f"{routing} routing, everyone with {threads} thread{'s' * (threads > 1)} a rank"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second, one panel a routing; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, routing in zip(figure.subplots(1, 2, sharex=True, sharey=True), ROUTINGS, strict=True):
        chosen = [row for row in rows if row["routing"] == routing]
        rates = [row["tokens_per_second"] for row in chosen]
        spread = [[one.median - one.least for one in rates], [one.greatest - one.median for one in rates]]
        colours = ["tab:blue" if row["way"].startswith(OURS) else "tab:gray" for row in chosen]
        axis.barh([row["way"] for row in chosen], [one.median for one in rates], xerr=spread, color=colours)
        axis.set_title(f"{routing} routing", loc="left", fontsize=10)
        axis.set_xlabel("tokens/s of a training step; lines from least to most")
        if routing == ROUTINGS[0]:
            axis.invert_yaxis()  # the other panel shares it
    figure.savefig(path, dpi=120)
