"""report.md and report.html: what a run did and what to look at, rendered from the files of its folder alone."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.redact import redact
from launch import balance_stats
from launch.accounting import read_account
from launch.console import duration
from launch.findings import alarm_table, findings, slow_ranks
from launch.history import alarm_spells, read_history, read_pairs, summarize_history
from launch.pictures import draw
from launch.report_html import write_html
from launch.run_facts import facts_table
from launch.runfolder import RunFolder, read_records
from launch.telemetry import dotted
from launch.time_report import time_section

_COMPRESSORS = (("gzip -9", "gzip_bits_per_byte"), ("xz -9", "xz_bits_per_byte"))
MAX_EVENTS = 60  # lines of the events table
ESSENTIALS = (
    "model.hidden_size", "model.num_hidden_layers", "model.n_routed_experts", "model.num_experts_per_tok",
    "model.n_shared_experts", "model.num_nextn_predict_layers", "model.vocab_size", "data.path", "data.seq_len",
    "data.seed", "train.steps", "train.global_batch_size", "train.micro_batch_size", "train.precision", "train.seed",
    "parallel.ep_size", "parallel.zero_stage", "parallel.dispatch", "parallel.recompute", "cluster.nodes",
    "cluster.workers", "optimizer.lr", "optimizer.schedule", "optimizer.warmup_steps", "balance.rule", "balance.rate",
)  # fmt: skip
NOT_MORE = (  # columns, or not for people
    "time", "seconds", "process", "kind", "step", "cause", "metrics_bytes", "ledger_bytes",
)  # fmt: skip


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """The run's figures in a few numbers, for the summary at its end and ``--json``.

    Those of ``history.summarize_history``, and under ``accounting`` those of ``accounting.Account.figures``.
    """
    account = read_account(run_dir)
    spent = {} if account is None else {"accounting": account.figures()}
    return {**summarize_history(read_history(RunFolder(run_dir))), **spent}


def write_report(run_dir: str | Path) -> Path:
    """Writes report.md, the pictures it shows to ``plots/``, and report.html with all of them inside.

    Returns: the path of report.md. Raises: FileNotFoundError when the folder is not a run; DamagedRecordError.
    """
    run = RunFolder(run_dir)
    if not run.is_run():
        raise FileNotFoundError(f"{run.path} has no config.toml, so it is not a run; give the folder of a run")
    config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    events = read_records(run.events_path)
    history = read_history(run)
    summary = summarize_history(history)
    spells = alarm_spells(events)
    parts = [f"# Run {run.path.resolve().name}", ""]
    if summary["steps"]:
        layers = balance_stats.layer_names(config, history.loads.shape[1]) if len(history.loads) else []
        parts += [_opening(summary), ""]
        evaluated = _evaluation(events)
        parts += [evaluated, ""] if evaluated else []
        facts = facts_table(events)
        parts += [*facts, ""] if facts else []
        parts += [*_figures_table(summary), ""]
        pairs = read_pairs(run, summary["last_step"])
        found = findings(history, spells, pairs, summary, layers, lane_period(config))
        if found:
            parts += ["## Balance in words", "", *(f"- {sentence}" for sentence in found), ""]
        parts += ["## Alarms", "", *alarm_table(spells), ""] if spells else []
        slow = slow_ranks(events)
        parts += ["## Slow ranks", "", *(f"- {sentence}" for sentence in slow), ""] if slow else []
        parts += [draw(run.path / "plots", history, events, spells, pairs, layers), ""]
        parts += ["## What to look at", "", *_advice(summary, events), ""]
    else:
        parts += ["No step has been recorded yet.", ""]
    parts += time_section(run.path / "plots", read_account(run))
    parts += [
        "## Configuration",
        "",
        *_config_table(config),
        "",
        "The whole of it is in [config.toml](config.toml).",
        "",
    ]
    parts += ["## Events", "", *_events_table(events), ""]
    unfinished = run.report.with_suffix(".md.partial")
    unfinished.write_text(redact("\n".join(parts)), encoding="utf-8")
    unfinished.replace(run.report)
    write_html(run.report)
    return run.report


def _opening(s: Mapping[str, Any]) -> str:
    text = (
        f"{s['steps']} optimizer steps to step {s['last_step']}, {s['tokens']:,} tokens, "
        f"{duration(s['train_seconds'])} of step time on {s['world_size']} rank(s). "
        f"Loss {_show(s['loss_first'])} at the first step, {_show(s['loss_last'])} over the last {s['window_steps']}."
    )
    if s["heldout_loss_last"] is not None:
        text += f" Held-out loss {_show(s['heldout_loss_last'])} at the last evaluation in the course of training"
        bits = s["heldout_bits_per_byte_last"]
        text += "." if bits is None else f", {_show(bits)} bits per byte."
    if s["max_vio_last"] is not None:
        text += (
            f" max_vio {_show(s['max_vio_first'])} over the first {s['window_steps']} steps, "
            f"{_show(s['max_vio_last'])} over the last; chance alone would leave about {_show(s['max_vio_floor'])}."
        )
    return text


def _evaluation(events: Sequence[Mapping[str, Any]]) -> str:
    """The last evaluation of held-out documents after training, in a sentence; empty without one."""
    last = next((event for event in reversed(events) if event["kind"] == "evaluation"), None)
    if last is None or last.get("heldout_loss") is None:
        return ""
    text = f"Evaluated at step {last['step']}: held-out loss {last['heldout_loss']:.4f}"
    if last.get("bits_per_byte") is not None:
        text += f", **{last['bits_per_byte']:.4f} bits per byte**"
        others = [f"{name} {last[key]:.4f}" for name, key in _COMPRESSORS
                  if last.get(key) is not None]  # fmt: skip
        text += f" ({' and '.join(others)} on the same bytes)" if others else ""
    return text + "."


def _figures_table(s: Mapping[str, Any]) -> list[str]:
    speed = f"{_show(s['tokens_per_second'], 0)} ({_show(s['tokens_per_second_p10'], 0)} to "
    rows = [
        ("tokens per second, median (10th to 90th percentile)", speed + f"{_show(s['tokens_per_second_p90'], 0)})"),
        ("step time spent waiting for data", _percent(s["data_wait_share"])),
        ("step time spent in all-to-all", _percent(s["all_to_all_share"])),
        ("step time spent waiting for the busiest rank, mean of all ranks", _percent(s["waiting_share"])),
        ("sent in all-to-all a step, all ranks, median", _mib(s["bytes_sent"])),
        ("MFU, median", _percent(s["mfu"])),
        ("memory of rank 0, largest", "-" if s["memory_gib"] is None else f"{s['memory_gib']:.2f} GiB"),
        ("max_vio of the busiest rank, last steps", _show(s["max_vio_rank_last"])),
        ("experts without a token, last steps", _show(s["dead_experts_last"], 1)),
        ("choices that the bias changed, last steps", _percent(s["changed_by_bias_last"])),
        ("gate entropy, last steps", "-" if s["gate_entropy_last"] is None else f"{s['gate_entropy_last']:.2f} nats"),
        ("largest bias", _show(s["bias_abs_max"], 4)),
    ]
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _advice(s: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row for each thing that goes wrong, marked where this run shows it."""
    floor, vio = s["max_vio_floor"], s["max_vio_last"]
    troubles = _troubles(events)
    rows = [
        (vio is not None and floor is not None and vio > 2 * floor,
         "max_vio stays far above the floor",
         "Still falling: train on, or raise `balance.rate`. Swinging up and down in the bias picture: lower it. "
         "A few experts far off in every picture: the router has collapsed early; look at `optimizer.lr` and warm-up."),
        ((s["max_vio_rank_last"] or 0) > 0.2,
         "the busiest rank gets much more than its share",
         "The step waits for it: compare with the share of waiting. `balance.placement = load` deals the experts out "
         "by load at the next save; more experts a rank (smaller `parallel.ep_size`) even it out too."),
        ((s["dead_experts_last"] or 0) >= 1,
         "experts without a token",
         "Orange in the load picture. A few at the start are normal; for long, their bias should climb until they are "
         "chosen: check that `balance.rule` is not `none`."),
        ((s["data_wait_share"] or 0) > 0.05,
         "waiting for data",
         "Above a few percent the input is the limit: nearer or faster storage for `data.path`."),
        ((s["all_to_all_share"] or 0) > 0.3,
         "much time in all-to-all",
         "Includes waiting for the slowest rank. Keep expert groups inside a node, use larger micro-batches."),
        ((s["tokens_per_second_p10"] or 1) < 0.7 * (s["tokens_per_second"] or 0),
         "uneven throughput",
         "Other work on the machine, saves that block, or a rank that falls behind: see the throughput picture and "
         "`logs/`."),
        (any(event["kind"] == "straggler" for event in events),
         "a rank that is slower than the others",
         "Named under Slow ranks. The same host again and again: look at its clocks, temperature and memory, "
         "and at what else runs there, or leave it out. Another reason is more work: see the loads of the ranks."),
        (s["loss_last"] is None or (s["steps"] > 1 and s["loss_last"] >= (s["loss_first"] or math.inf)),
         "the loss does not fall or is not a number",
         "Lower `optimizer.lr`, lengthen `optimizer.warmup_steps`; look for jumps in `grad_norm` in metrics.jsonl."),
        (bool(troubles),
         "faults, restarts, roll-backs or skipped steps",
         f"This run has {troubles or 'none'}. Their causes stand under Events, what the ranks printed in `logs/`."),
    ]  # fmt: skip
    table = ["| here | sign | what to do |", "|---|---|---|"]
    return table + [f"| {'**yes**' if seen else 'no'} | {sign} | {advice} |" for seen, sign, advice in rows]


def _troubles(events: Sequence[Mapping[str, Any]]) -> str:
    """How many of each kind: "1 restart, 2 skipped steps"; empty without any."""
    named = (("fault", "fault"), ("restart", "restart"), ("rewind", "roll-back"), ("skip", "skipped step"))
    counts = [(sum(event["kind"] == kind for event in events), name) for kind, name in named]
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)


def lane_period(config: Mapping[str, Any]) -> int | None:
    """Steps after which the same lanes of the data are read again; None where that is no whole number of steps."""
    lanes, batch = config.get("data", {}).get("lanes"), config.get("train", {}).get("global_batch_size")
    return lanes // batch if lanes and batch and lanes % batch == 0 else None


def _config_table(config: Mapping[str, Any]) -> list[str]:
    flat = dotted(config)
    rows = [f"| `{key}` | {_cell(flat[key])} |" for key in ESSENTIALS if key in flat]
    return ["| key | value |", "|---|---|", *rows]


def _events_table(events: Sequence[Mapping[str, Any]]) -> list[str]:
    if not events:
        return ["None were recorded."]
    lines = ["| time (UTC) | event | step | cause | more |", "|---|---|---|---|---|"]
    events = [event for event in events if event["kind"] != "accounting"]  # they have a section of their own
    for event in events[-MAX_EVENTS:]:
        more = [f"{key} {value}" for key, value in event.items() if key not in NOT_MORE]
        cells = (event["time"][:19].replace("T", " "), event["kind"], event.get("step", ""), event["cause"])
        lines.append(f"| {' | '.join(map(_cell, cells))} | {_cell(', '.join(more))} |")
    if len(events) > MAX_EVENTS:
        lines += ["", f"The last {MAX_EVENTS} of {len(events)}; all are in events.jsonl."]
    return lines


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _mib(number: float | None) -> str:
    return "-" if number is None else f"{number / 2**20:,.1f} MiB"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
