"""report.md: what a run did and what to look at, rendered from the files of its folder alone, with plots beside it."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch import balance_stats
from launch.console import duration
from launch.runfolder import RunFolder, read_records
from launch.telemetry import dotted

MAX_DRAWN_STEPS = 480  # steps whose loads and biases are drawn; more would be narrower than a pixel
MAX_EVENTS = 60  # lines of the events table
MAX_MARKS = 12  # events that the plots show
ESSENTIALS = (
    "model.hidden_size", "model.num_hidden_layers", "model.n_routed_experts", "model.num_experts_per_tok",
    "model.n_shared_experts", "model.num_nextn_predict_layers", "model.vocab_size", "data.path", "data.seq_len",
    "data.seed", "train.steps", "train.global_batch_size", "train.micro_batch_size", "train.precision", "train.seed",
    "parallel.ep_size", "parallel.zero_stage", "parallel.dispatch", "parallel.recompute", "cluster.nodes",
    "cluster.workers", "optimizer.lr", "optimizer.schedule", "optimizer.warmup_steps", "balance.rule", "balance.rate",
)  # fmt: skip
NOT_MORE = ("time", "seconds", "kind", "step", "cause", "metrics_bytes", "ledger_bytes")  # columns, or not for people
FIGURES = (
    "loss", "mtp_loss", "grad_norm", "tokens_per_second", "step_seconds", "data_wait_seconds", "all_to_all_seconds",
    "exposed_all_to_all_seconds", "mfu", "memory_gib", "max_vio", "max_vio_rank", "max_vio_floor", "dead_experts",
    "bias_abs_max", "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class History:
    """A run's committed steps as columns; figures that a step lacks are NaN.

    steps: (n,) int64 ascending; figures: each of FIGURES as (n,) float64; last: the last record.
    drawn_steps: (M,) int64, evenly thinned steps whose loads are known; loads: (M, L, E) int64; bias: (M, L, E)
    float64, NaN where there is none.
    """

    steps: np.ndarray
    figures: dict[str, np.ndarray]
    last: dict[str, Any]
    drawn_steps: np.ndarray
    loads: np.ndarray
    bias: np.ndarray


def read_history(run: RunFolder) -> History:
    """Reads metrics.jsonl in one pass; memory grows with the figures, not with the experts."""
    steps: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in FIGURES}
    drawn: list[tuple[int, np.ndarray, np.ndarray]] = []
    seen, stride, last = 0, 1, {}
    for last in run.committed("metrics"):
        steps.append(last["step"])
        for name, column in columns.items():
            column.append(math.nan if last.get(name) is None else last[name])
        if last.get("tokens_per_expert"):
            if seen % stride == 0:
                loads = np.array(last["tokens_per_expert"], dtype=np.int64)
                bias = last.get("expert_bias")
                drawn.append((steps[-1], loads, np.array(bias if bias else loads * math.nan, dtype=np.float64)))
            seen += 1
            if len(drawn) > MAX_DRAWN_STEPS:
                drawn, stride = drawn[::2], stride * 2
    drawn = [one for one in drawn if one[1].shape == drawn[-1][1].shape]
    return History(
        np.array(steps, dtype=np.int64),
        {name: np.array(column, dtype=np.float64) for name, column in columns.items()},
        last,
        np.array([step for step, _, _ in drawn], dtype=np.int64),
        np.array([loads for _, loads, _ in drawn], dtype=np.int64),
        np.array([bias for _, _, bias in drawn], dtype=np.float64),
    )


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """The run's figures in a few numbers, for the summary at its end and for ``--json``; see ``summarize_history``."""
    return summarize_history(read_history(RunFolder(run_dir)))


def summarize_history(history: History) -> dict[str, Any]:
    """A run in a few numbers; None where a figure was never measured.

    ``loss_first`` is the first step's. ``loss_last``, ``mtp_loss_last``, ``max_vio_first``, ``max_vio_last`` and
    ``max_vio_rank_last`` are means over ``window_steps``: a tenth of the run, at most 20 steps. Shares are of the
    summed step time. Speed and MFU are medians over the steps, so that a save or a warm-up does not move them.
    """
    n = len(history.steps)
    if n == 0:
        return {"steps": 0, "last_step": 0}
    window = min(20, -(-n // 10))
    figure = history.figures
    busy = np.nansum(figure["step_seconds"])

    def share(name: str) -> float | None:
        known = np.isfinite(figure[name]).any() and busy > 0
        return float(np.nansum(figure[name]) / busy) if known else None

    return {
        "steps": n,
        "last_step": int(history.steps[-1]),
        "window_steps": window,
        "tokens": int(history.last.get("tokens") or 0),
        "train_seconds": float(busy),
        "loss_first": _mean(figure["loss"][:1]),
        "loss_last": _mean(figure["loss"][-window:]),
        "mtp_loss_last": _mean(figure["mtp_loss"][-window:]),
        "tokens_per_second": _percentile(figure["tokens_per_second"], 50),
        "tokens_per_second_p10": _percentile(figure["tokens_per_second"], 10),
        "tokens_per_second_p90": _percentile(figure["tokens_per_second"], 90),
        "mfu": _percentile(figure["mfu"], 50),
        "memory_gib": _percentile(figure["memory_gib"], 100),
        "data_wait_share": share("data_wait_seconds"),
        "all_to_all_share": share(_waiting_name(figure)),
        "max_vio_first": _mean(figure["max_vio"][:window]),
        "max_vio_last": _mean(figure["max_vio"][-window:]),
        "max_vio_floor": _mean(figure["max_vio_floor"][-window:]),
        "max_vio_rank_last": _mean(figure["max_vio_rank"][-window:]),
        "dead_experts_last": _mean(figure["dead_experts"][-window:]),
        "bias_abs_max": _mean(figure["bias_abs_max"][-1:]),
        "world_size": history.last.get("world_size"),
    }


def _waiting_name(figure: Mapping[str, np.ndarray]) -> str:
    """The time that steps stood still for all-to-all; older records have only its whole time, which was the same."""
    exposed = "exposed_all_to_all_seconds"
    return exposed if np.isfinite(figure[exposed]).any() else "all_to_all_seconds"


def write_report(run_dir: str | Path) -> Path:
    """Writes report.md, and the pictures it shows to ``plots/``, into the run's folder.

    Returns: the path of report.md. Raises: FileNotFoundError when the folder is not a run; DamagedRecordError.
    """
    run = RunFolder(run_dir)
    if not run.is_run():
        raise FileNotFoundError(f"{run.path} has no config.toml, so it is not a run; give the folder of a run")
    config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    events = read_records(run.events_path)
    history = read_history(run)
    summary = summarize_history(history)
    parts = [f"# Run {run.path.resolve().name}", ""]
    if summary["steps"]:
        layers = balance_stats.layer_names(config, history.loads.shape[1]) if len(history.loads) else []
        parts += [_opening(summary), "", *_figures_table(summary), ""]
        parts += [_pictures(run.path / "plots", history, events, layers), ""]
        parts += ["## What to look at", "", *_advice(summary, events), ""]
    else:
        parts += ["No step has been recorded yet.", ""]
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
    unfinished.write_text("\n".join(parts), encoding="utf-8")
    unfinished.replace(run.report)
    return run.report


def _opening(s: Mapping[str, Any]) -> str:
    text = (
        f"{s['steps']} optimizer steps to step {s['last_step']}, {s['tokens']:,} tokens, "
        f"{duration(s['train_seconds'])} of step time on {s['world_size']} rank(s). "
        f"Loss {_show(s['loss_first'])} at the first step, {_show(s['loss_last'])} over the last {s['window_steps']}."
    )
    if s["max_vio_last"] is not None:
        text += (
            f" max_vio {_show(s['max_vio_first'])} over the first {s['window_steps']} steps, "
            f"{_show(s['max_vio_last'])} over the last; chance alone would leave about {_show(s['max_vio_floor'])}."
        )
    return text


def _figures_table(s: Mapping[str, Any]) -> list[str]:
    speed = f"{_show(s['tokens_per_second'], 0)} ({_show(s['tokens_per_second_p10'], 0)} to "
    rows = [
        ("tokens per second, median (10th to 90th percentile)", speed + f"{_show(s['tokens_per_second_p90'], 0)})"),
        ("step time spent waiting for data", _percent(s["data_wait_share"])),
        ("step time spent in all-to-all", _percent(s["all_to_all_share"])),
        ("MFU, median", _percent(s["mfu"])),
        ("memory of rank 0, largest", "-" if s["memory_gib"] is None else f"{s['memory_gib']:.2f} GiB"),
        ("max_vio of the busiest rank, last steps", _show(s["max_vio_rank_last"])),
        ("experts without a token, last steps", _show(s["dead_experts_last"], 1)),
        ("largest bias", _show(s["bias_abs_max"], 4)),
    ]
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _pictures(folder: Path, history: History, events: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> str:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "There are no pictures: matplotlib is not installed (`pip install matplotlib`, then render this again)."
    from launch import plots

    folder.mkdir(exist_ok=True)
    steps, figure = history.steps, history.figures
    kinds = ("restart", "resume", "rewind", "fault", "skip")
    kinds_at: dict[int, dict[str, None]] = {}  # the kinds of each step, without repetition, in the order of writing
    for event in events:
        if event["kind"] in kinds and steps[0] <= event.get("step", -1) <= steps[-1]:
            kinds_at.setdefault(event["step"], {})[event["kind"]] = None
    marks = [(step, ", ".join(names)) for step, names in kinds_at.items()][-MAX_MARKS:]
    shown: list[tuple[str, str, str]] = []  # heading, file, what it shows

    def known(name: str) -> bool:
        return bool(np.isfinite(figure[name]).any())

    if known("loss"):
        plots.save_loss(folder / "loss.png", steps, figure["loss"], figure["mtp_loss"], marks)
        shown.append(("Loss", "loss.png", "Mean cross-entropy of the global batch. Dotted lines are events."))
    if known("max_vio"):
        balance = (figure["max_vio"], figure["max_vio_rank"], figure["max_vio_floor"])
        plots.save_balance(folder / "max_vio.png", steps, *balance, marks)
        shown.append((
            "Balance", "max_vio.png",
            "max_vio averaged over the MoE layers (arXiv 2408.15664). The floor is sqrt(2 ln E * E / (T K)) for E "
            "experts and T K routed choices a step: what a perfectly fair router shows by chance.",
        ))  # fmt: skip
    if len(history.loads):
        plots.save_load_heat_maps(folder / "loads.png", history.drawn_steps, history.loads, layers)
        shown.append(("Loads", "loads.png", f"{len(history.drawn_steps)} steps are drawn."))
        if np.isfinite(history.bias[-1]).all():
            plots.save_bias(folder / "bias.png", history.drawn_steps, history.bias, layers)
            shown.append(("Bias", "bias.png", "A bias that keeps climbing belongs to an expert that few tokens want."))
    if known("tokens_per_second"):
        plots.save_speed(folder / "speed.png", steps, figure["tokens_per_second"], marks)
        shown.append(("Throughput", "speed.png", "All ranks together."))
    if known("step_seconds"):
        waits = {"waiting for data": figure["data_wait_seconds"], "all-to-all": figure[_waiting_name(figure)]}
        plots.save_time_shares(folder / "time.png", steps, figure["step_seconds"], waits, marks)
        shown.append(("Where the time goes", "time.png", "Shares of each step's time on rank 0."))
    if known("memory_gib"):
        plots.save_memory(folder / "memory.png", steps, figure["memory_gib"], marks)
        shown.append(("Memory", "memory.png", "The largest so far on rank 0; a line that keeps climbing is a leak."))
    return "\n\n".join(f"## {heading}\n\n![{heading}](plots/{file})\n\n{caption}" for heading, file, caption in shown)


def _advice(s: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row for each thing that goes wrong, marked where this run shows it."""
    floor, vio = s["max_vio_floor"], s["max_vio_last"]
    faults = sum(event["kind"] in ("fault", "restart", "rewind") for event in events)
    skips = sum(event["kind"] == "skip" for event in events)
    rows = [
        (vio is not None and floor is not None and vio > 2 * floor,
         "max_vio stays far above the floor",
         "Still falling: train on, or raise `balance.rate`. Swinging up and down in the bias picture: lower it. "
         "A few experts far off in every picture: the router has collapsed early; look at `optimizer.lr` and warm-up."),
        ((s["max_vio_rank_last"] or 0) > 0.2,
         "the busiest rank gets much more than its share",
         "The step waits for it. Compare with the all-to-all share; more experts a rank (smaller `parallel.ep_size`) "
         "even it out."),
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
        (s["loss_last"] is None or (s["steps"] > 1 and s["loss_last"] >= (s["loss_first"] or math.inf)),
         "the loss does not fall or is not a number",
         "Lower `optimizer.lr`, lengthen `optimizer.warmup_steps`; look for jumps in `grad_norm` in metrics.jsonl."),
        (faults + skips > 0,
         "faults, restarts, roll-backs or skipped steps",
         f"This run has {faults}, and {skips} skipped steps. Their causes stand under Events, what the ranks printed "
         "in `logs/`."),
    ]  # fmt: skip
    table = ["| here | sign | what to do |", "|---|---|---|"]
    return table + [f"| {'**yes**' if seen else 'no'} | {sign} | {advice} |" for seen, sign, advice in rows]


def _config_table(config: Mapping[str, Any]) -> list[str]:
    flat = dotted(config)
    rows = [f"| `{key}` | {_cell(flat[key])} |" for key in ESSENTIALS if key in flat]
    return ["| key | value |", "|---|---|", *rows]


def _events_table(events: Sequence[Mapping[str, Any]]) -> list[str]:
    if not events:
        return ["None were recorded."]
    lines = ["| time (UTC) | event | step | cause | more |", "|---|---|---|---|---|"]
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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _percentile(values: np.ndarray, percent: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percent)) if known.size else None
