"""From the results of single runs to rows, the check of losses, the network's fit, and the table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.bench_record import Spread
from launch.bench_scaling_parts import (
    LOSS_TOLERANCE,
    OPTIMIZER,
    PARTS,
    REST,
    WAITING,
    ZERO,
    Measured,
    efficiency,
    fit_network,
    loss_difference,
    lost_to,
    measured,
)
from launch.bench_scaling_plan import NATURAL, STRONG, Run, batch_of


def rows_of(
    results: Mapping[Run, Mapping[str, Any]],
    modes: Sequence[str],
    routings: Sequence[str],
    sizes: Sequence[int],
    base: int,
    wanted: Sequence[Run],
    warm_up: int,
) -> list[dict[str, Any]]:
    """A row for each mode, routing and size.

    The parts are those of the run in the middle, by tokens/s; so they add up, which medians of each would not. The base
    is the run in the middle of its size, under the same routing. The spread of the efficiency is that of pairs: each
    repeat beside the base's run of the same repeat, which was made a moment before or after.
    """
    figures = {run: measured(result, warm_up) for run, result in results.items()}
    batch_at_base = next(run.batch for run in wanted if run.size == base)
    found = []
    for mode in modes:
        for size in sorted(sizes):
            batch = batch_of(mode, size, base, batch_at_base)
            for routing in routings:
                runs, bases = (_repeats(figures, *key, routing) for key in ((size, batch), (base, batch_at_base)))
                found.append(_row(mode, routing, batch, runs, bases))
    return found


def _repeats(figures: Mapping[Run, Measured], size: int, batch: int, routing: str) -> list[Measured]:
    chosen = [run for run in figures if (run.size, run.batch, run.routing) == (size, batch, routing)]
    return [figures[run] for run in sorted(chosen, key=lambda run: run.repeat)]


def _middle(runs: Sequence[Measured]) -> Measured:
    """The run in the middle by tokens/s, the slower of two."""
    return sorted(runs, key=lambda run: run.tokens_per_second)[(len(runs) - 1) // 2]


def _row(mode: str, routing: str, batch: int, runs: Sequence[Measured], bases: Sequence[Measured]) -> dict[str, Any]:
    here, base = _middle(runs), _middle(bases)
    rates = [run.tokens_per_second for run in runs]
    pairs = [efficiency(run, beside) for run, beside in zip(runs, bases, strict=True)]
    parity = None
    if mode == STRONG:
        parity = max(loss_difference(run.losses, bases[0].losses) for run in runs)
    return {
        "mode": mode, "routing": routing, "ranks": here.ranks, "sequences": batch, "run": here.name, "base": base.name,
        "tokens_per_second": Spread(here.tokens_per_second, min(rates), max(rates), len(rates)),
        "efficiency": Spread(efficiency(here, base), min(pairs), max(pairs), len(pairs)),
        "step_seconds": here.seconds, "seconds": dict(here.parts), "lost": lost_to(here, base),
        "loss_difference": parity, "mib_sent_a_rank": here.mib_sent,
    }  # fmt: skip


def parity_sentence(results: Mapping[Run, Mapping[str, Any]], base: int, steps: int) -> tuple[bool, str]:
    """Whether all runs of the same global batches have the same losses, and that as a sentence."""
    worst, where, compared = 0.0, "", 0
    first: dict[tuple[int, str], tuple[float, ...]] = {}
    for run in sorted(results, key=lambda run: (run.size != base, run.size, run.repeat)):
        losses = tuple(step["loss"] for step in results[run]["metrics"])
        key = (run.batch, run.routing)
        if key not in first:
            first[key] = losses
            continue
        compared += 1
        difference = loss_difference(losses, first[key])
        if not difference <= worst:
            worst, where = difference, f" (at {run.name})"
    if worst > LOSS_TOLERANCE:
        return False, (
            f"LOSSES DO NOT AGREE: runs of the same global batches differ by {worst:.1e}{where}, more than "
            f"{LOSS_TOLERANCE:g}: these sizes did not train the same model"
        )
    return True, (
        f"losses agree: over all {steps} steps, {compared} runs differ from another of the same global batches by at "
        f"most {worst:.1e} of the loss{where}, allowed are {LOSS_TOLERANCE:g}"
    )


def network_rows(results: Mapping[Run, Mapping[str, Any]], nbytes: Sequence[int]) -> list[dict[str, Any]]:
    """For each size above one: median seconds of each message size over all natural runs, and the fit."""
    found = []
    for size in sorted({run.size for run in results if run.size > 1}):
        sweeps = [result["sweep"] for run, result in results.items() if run.size == size and run.routing == NATURAL]
        sweeps = [sweep for sweep in sweeps if sweep]
        if not sweeps:
            continue
        pooled = [[took for sweep in sweeps for took in sweep[place]] for place in range(len(nbytes))]
        middle = [statistics.median(took) for took in pooled]
        fit = fit_network(nbytes, middle)
        found.append({
            "ranks": size, "bytes": list(nbytes), "seconds": middle, "least": [min(took) for took in pooled],
            "greatest": [max(took) for took in pooled], "calls": len(pooled[0]), "latency_s": fit.latency_s,
            "seconds_per_byte": fit.seconds_per_byte, "gigabytes_per_second": fit.gigabytes_per_second,
            "residuals": list(fit.residuals),
        })  # fmt: skip
    return found


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The tables, the check, the fit and the machine, as text."""
    where = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    lines = [
        f"{facts['preset']}: hidden {facts['hidden_size']}, {facts['experts']} experts, top-{facts['top_k']}, "
        f"sequences of {facts['seq_len']}, micro-batches of {facts['micro_batch']}, ZeRO {facts['zero_stage']}, "
        f"dispatch {facts['dispatch']}",
        f"{facts['repeats']} runs of {facts['steps']} steps after {facts['warm_up']} of warm-up at each size, sizes "
        f"in turn; {facts['launcher']} launcher, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''} a rank",
        f"{where['processor']}, {where['cores']} cores (load {where['load']}), {where['memory_gib']} GiB; Python "
        f"{where['python']}, {versions}",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        lines += ["", *_mode_table(mode, [row for row in rows if row["mode"] == mode])]
    lines += ["", *_time_table(rows)]
    lines += [
        "",
        "efficiency: tokens a rank-second beside the base's. The columns from compute to rest add up to what is lost,",
        "in % of the time at that size: rank-seconds a token beyond the base's. Negative: cheaper than there.",
        f"{WAITING}: for the last rank to come to a collective; {OPTIMIZER}: AdamW and DeepSpeed's copies;",
        f"{ZERO}: gradient and weight collectives without that wait; {REST}: statistics, agreement, balancing,",
        "telemetry, Python between the timers.",
    ]
    if not facts["collectives_timed"]:
        lines.append(
            f"On a GPU collectives are not timed: {ZERO} is inside compute and {OPTIMIZER}, and so is its wait."
        )
    notes = {row["ranks"]: row["note"] for row in rows if row.get("note")}
    lines += [f"{note}; its figures say nothing about scaling" for note in notes.values()]
    lines += [facts["loss_parity"], *_network(facts["network"])]
    return "\n".join(lines)


def _mode_table(mode: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    batches = sorted({row["sequences"] for row in rows})
    many = f"{batches[0]}" if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
    lines = [
        f"{mode} scaling, {many} sequences a step; base: {', '.join(dict.fromkeys(row['base'] for row in rows))}",
        f"{'ranks':>5} {'ep':>3} {'routing':<8}{'tokens/s':>9}{'least to most':>17}{'efficiency':>11}"
        f"{'least to most':>15} |{''.join(f'{part:>11}' for part in PARTS)} |{'loss differs':>13}",
    ]
    for row in rows:
        rate, share = row["tokens_per_second"], row["efficiency"]
        parity = row["loss_difference"]
        mark = "-" if parity is None else f"{parity:.1e}" + (" !" if parity > LOSS_TOLERANCE else "")
        parts = "".join(f"{100 * row['lost'][part]:>11.1f}" for part in PARTS)
        star = "*" if row.get("note") else " "
        lines.append(
            f"{row['ranks']:>4}{star} {row.get('ep_size', ''):>3} {row['routing']:<8}{rate.median:>9,.0f}"
            f"{f'{rate.least:,.0f} to {rate.greatest:,.0f}':>17}{share.median:>11.3f}"
            f"{f'{share.least:.3f} to {share.greatest:.3f}':>15} |"
            f"{parts} |{mark:>13}"
        )
    return lines


def _time_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the losses are made from: every part of a step, each run once."""
    width = max(len(row["run"]) for row in rows)
    lines = [f"{'ms of a step, mean over ranks':<{width}}{'step':>9} |{''.join(f'{part:>11}' for part in PARTS)}"]
    for name, row in {row["run"]: row for row in rows}.items():
        parts = "".join(f"{1e3 * row['seconds'][part]:>11.1f}" for part in PARTS)
        lines.append(f"{name:<{width}}{1e3 * row['step_seconds']:>9.1f} |{parts}")
    return lines


def _network(fits: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for fit in fits:
        residuals = ", ".join(
            f"{size >> 10} KiB {100 * rest:+.0f} %" for size, rest in zip(fit["bytes"], fit["residuals"], strict=True)
        )
        lines += [
            f"network, {fit['ranks']} ranks: an all_to_all_single takes {fit['latency_s'] * 1e6:.0f} us + bytes / "
            f"({fit['gigabytes_per_second']:.2f} GB/s); medians of {fit['calls']} calls lie beside the fit by",
            f"  {residuals}",
        ]
    return lines
