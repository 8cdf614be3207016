"""`trimtab bench generate`: tokens a second, ours beside transformers', with drafts and with rounded weights."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.context import EXIT_OK
from launch.arguments import add_refused
from launch.bench_generate_rank import OURS, WAYS
from launch.bench_moe import chosen_ways, installed
from launch.bench_ranks import RankError, run_ranks
from launch.bench_record import Spread, machine, write_record
from launch.config import Config, ConfigError, read
from launch.load import checkpoint_at
from launch.output import print_json
from model.config import ModelConfig
from model.latent_cache import latent_bytes

PACKAGES = ("torch", "numpy", "transformers")


Said = Mapping[str, Sequence[Mapping[str, Any]]]  # by way, a record for each batch size


def run(options: argparse.Namespace) -> int:
    """Measures, prints the tables and writes CSV, JSON and plot to `options.out`."""
    config = checked(options)
    ways = chosen_ways(options.only, WAYS)
    absent: dict[str, str] = {}
    if not config.num_nextn_predict_layers:
        absent |= dict.fromkeys((name for name in ways if WAYS[name].draft == "mtp"), "left out: no prediction module")
    if options.draft is None:
        absent |= dict.fromkeys((name for name in ways if WAYS[name].draft == "run"), "left out: no --draft RUN")
    if config.rope_scaling is not None:
        absent |= dict.fromkeys((name for name in ways if WAYS[name].experts), "left out: YaRN is not compared")
    ways, missing = installed([name for name in ways if name not in absent], {n: WAYS[n].packages for n in ways})
    absent |= missing
    source = {"run": str(options.run)} if options.run else {"model": asdict(config), "seed": 0}
    job = {
        **source, "draft": str(options.draft), "draft_tokens": options.draft_tokens, "batches": options.batches,
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "inner": options.inner,
        "threads": options.threads,
    }  # fmt: skip
    rows = table_rows(_measure(job, ways, options.repeats, absent), options.new_tokens)
    quality: dict[str, Any] = {}
    if options.run and not options.no_heldout:
        print("held-out documents with 32, 8 and 4 bits", file=sys.stderr, flush=True)
        evaluation = {"run": str(options.run), "documents": options.documents, "threads": options.threads}
        (quality,) = run_ranks("launch.bench_generate_rank:heldout", evaluation, 1)
    facts: dict[str, Any] = {
        "benchmark": "generate", "weights": str(options.run or f"{options.config}, random"), "model": asdict(config),
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "repeats": options.repeats,
        "inner": options.inner, "threads": options.threads, "absent": absent, "heldout": quality,
        "cache_bytes_per_token": latent_bytes(config, 1, 4), "machine": machine(PACKAGES),
    }  # fmt: skip
    print(render(rows, facts))
    write_record(options.out, "generate", rows, facts)
    plot(rows, options.out / "generate.png")
    print(f"written: {options.out}/generate.csv, generate.json, generate.png")
    if options.json:
        print_json(json.loads((options.out / "generate.json").read_text(encoding="utf-8")))
    return EXIT_OK


def checked(options: argparse.Namespace) -> ModelConfig:
    """The model's configuration; raises ConfigError for everything that is wrong."""
    found = [
        f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}"
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("inner", 1), ("threads", 1),
                            ("draft_tokens", 1))
        if getattr(options, name) < least
    ]  # fmt: skip
    found += [f"--batches {batch} must be at least 1" for batch in options.batches if batch < 1]
    config: Config | None = None
    for name in ("run", "draft"):
        folder = getattr(options, name)
        if folder is not None:
            try:
                checkpoint_at(folder, None)
            except ConfigError as error:
                found += [f"--{name}: {text}" for text in error.problems]
    if not found:
        source = options.config if options.run is None else str(options.run / "config.toml")
        config = read(source, [], found)
        longest = config.model.max_position_embeddings
        if longest_prompt(options) + options.new_tokens > longest:
            found.append(
                f"--new-tokens {options.new_tokens} and prompts of up to {longest_prompt(options)} "
                f"(--prompt-tokens, --inner) exceed model.max_position_embeddings = {longest} together; use fewer"
            )
    add_refused(found, options)
    if found or config is None:
        raise ConfigError(found)
    return config.model


def longest_prompt(options: argparse.Namespace) -> int:
    """Tokens; each timed call, two for each of `inner`, has prompts of one more than the last."""
    return int(options.prompt_tokens + 2 * options.inner)


def _measure(job: dict[str, Any], ways: Sequence[str], repeats: int, absent: dict[str, str]) -> dict[str, list[Said]]:
    """By way, what each repeat's fresh process said."""
    found: dict[str, list[Said]] = {}
    for number in range(repeats):
        for name in ways:
            if name in absent:
                continue
            try:
                results = run_ranks("launch.bench_generate_rank:measure", {**job, "way": name}, 1)
            except RankError as error:
                if name == OURS:
                    print(error.log, file=sys.stderr)
                    raise
                absent[name] = f"failed: {error}"
                continue
            found.setdefault(name, []).append(results[0])
        print(f"repeat {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return found


def table_rows(found: Mapping[str, Sequence[Said]], new_tokens: int) -> list[dict[str, Any]]:
    """A row for each batch size and way; speed and tokens are compared with our plain way's in the same process.

    Args:
        found: by way a list of repeats, each what bench_generate_rank.measure returns.
        new_tokens: of each prompt.
    """
    rows: list[dict[str, Any]] = []
    for name, repeats in found.items():
        for place, entry in enumerate(repeats[0][name]):
            batch = entry["batch"]
            whole = [seconds for repeat in repeats for seconds in repeat[name][place]["whole"]]
            ours = [seconds for repeat in repeats for seconds in repeat[OURS][place]["whole"]]
            first = Spread.of([seconds for repeat in repeats for seconds in repeat[name][place]["first"]])
            rows.append({
                "batch": batch, "way": name,
                "tokens_per_second": Spread.of([batch * new_tokens / seconds for seconds in whole]),
                "of_ours": Spread.of([mine / its for mine, its in zip(ours, whole, strict=True)]),
                "later_token_ms": (Spread.of(whole).median - first.median) / (new_tokens - 1) * 1e3,
                "first_token_ms": first.median * 1e3,
                "weight_bytes": entry["weight_bytes"], "acceptance": entry["acceptance"],
                "tokens_per_forward": new_tokens / entry["forwards"] if entry["forwards"] else None,
                "same_tokens": _alike(repeats[0][OURS][place]["tokens"], entry["tokens"]),
            })  # fmt: skip
    return rows


def _alike(ours: Sequence[Sequence[int]], its: Sequence[Sequence[int]]) -> float:
    """Part of the places that hold the same token."""
    pairs = [a == b for mine, other in zip(ours, its, strict=True) for a, b in zip(mine, other, strict=True)]
    return sum(pairs) / len(pairs)


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The tables, what is absent, and the machine, as text."""
    where = facts["machine"]
    lines = [
        f"greedy generation with {facts['weights']}: prompts of {facts['prompt_tokens']} tokens and a few more, no two "
        f"calls alike, {facts['new_tokens']} new ones; medians of {facts['repeats']} fresh processes with "
        f"{facts['inner']} runs each; our cache takes {facts['cache_bytes_per_token']:,} bytes a token in fp32",
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), threads {facts['threads']}; "
        + ", ".join(f"{name} {found}" for name, found in where["packages"].items() if found),
    ]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        lines.append(f"batch {batch}")
        lines.append(
            f"{'way':<26}{'tokens/s':>10}{'least':>9}{'most':>9}{'of ours':>18}{'first ms':>10}{'later ms':>10}"
            f"{'MiB':>8}{'accepted':>10}{'a forward':>11}{'same':>7}"
        )
        lines += [_line(row) for row in rows if row["batch"] == batch]
    if facts["heldout"]:
        exact = facts["heldout"]["32"]
        key = "loss" if exact["bits_per_byte"] is None else "bits_per_byte"  # of a tokenizer that loses bytes
        title = "nats/token" if key == "loss" else "bits/byte"
        lines.append(f"held out, {exact['heldout_bytes']:,} bytes{'':<6}{title:>10}{'change':>9}{'MiB':>8}")
        for bits, found in facts["heldout"].items():
            change = found[key] / exact[key] - 1 if exact[key] else 0.0
            name = "fp32" if bits == "32" else f"int{bits}"
            lines.append(f"{name:<31}{found[key]:>10.4f}{change:>9.2%}{found['weight_bytes'] / 2**20:>8.1f}")
    lines += [f"{name}: {reason}" for name, reason in facts["absent"].items()]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    speed = row["tokens_per_second"]
    of_ours = row["of_ours"]
    ratio = f"{of_ours.median:.2f} ({of_ours.least:.2f}-{of_ours.greatest:.2f})"
    accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    each = "" if row["tokens_per_forward"] is None else f"{row['tokens_per_forward']:.2f}"
    return (
        f"{row['way']:<26}{speed.median:>10.0f}{speed.least:>9.0f}{speed.greatest:>9.0f}{ratio:>18}"
        f"{row['first_token_ms']:>10.1f}{row['later_token_ms']:>10.2f}{row['weight_bytes'] / 2**20:>8.1f}"
        f"{accepted:>10}{each:>11}{row['same_tokens']:>7.0%}"
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second, a panel for each batch size; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(panels, batches, strict=True):
        chosen = [row for row in rows if row["batch"] == batch]
        speeds = [row["tokens_per_second"] for row in chosen]
        spread = [[one.median - one.least for one in speeds], [one.greatest - one.median for one in speeds]]
        colours = ["tab:blue" if row["way"].startswith(OURS) else "tab:gray" for row in chosen]
        axis.barh([row["way"] for row in chosen], [one.median for one in speeds], xerr=spread, color=colours)
        axis.set_title(f"batch {batch}", loc="left", fontsize=10)
        axis.set_xlabel("tokens a second, lines from least to most")
    panels[0].invert_yaxis()  # the others share it
    figure.savefig(path, dpi=120)
