"""The report's pictures: which of them a run's figures allow, drawn, and the Markdown that shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.history import History, Spell, waiting_name
from launch.plots import ALARM, Marks

MAX_MARKS = 12  # events that the plots show beside the alarms
MARKED = ("fault", "restart", "rewind", "resume", "skip", "placement")  # the most telling first

Shown = list[tuple[str, str, str]]  # heading, file, what it shows


def draw(
    folder: Path,
    history: History,
    events: Sequence[Mapping[str, Any]],
    spells: Sequence[Spell],
    pairs: tuple[int, list[str], np.ndarray] | None,
    layers: Sequence[str],
) -> str:
    """Draws into ``folder`` and returns Markdown; without matplotlib a sentence that says so.

    Args:
        pairs: what ``history.read_pairs`` gave. layers: a name for each row of the loads.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "There are no pictures: matplotlib is not installed (`pip install matplotlib`, then render this again)."
    folder.mkdir(exist_ok=True)
    marks = marks_of(history.steps, events, spells)
    shown = [
        *_of_loss(folder, history, marks),
        *_of_balance(folder, history, spells, layers, marks),
        *_of_router(folder, history, pairs, layers, marks),
        *_of_speed(folder, history, marks),
    ]
    return "\n\n".join(f"## {heading}\n\n![{heading}](plots/{file})\n\n{caption}" for heading, file, caption in shown)


def marks_of(steps: np.ndarray, events: Sequence[Mapping[str, Any]], spells: Sequence[Spell]) -> Marks:
    """(step, what happened) of the last events that the plots mark, and of every step that raised an alarm."""
    kinds_at: dict[int, set[str]] = {}
    for event in events:
        if event["kind"] in MARKED and steps[0] <= event.get("step", -1) <= steps[-1]:
            kinds_at.setdefault(event["step"], set()).add(event["kind"])
    # One word a step: a fault is followed by a restart, a rewind and a resume at the same one.
    marks = [(step, min(kinds, key=MARKED.index)) for step, kinds in list(kinds_at.items())[-MAX_MARKS:]]
    alarms = {spell.raised for spell in spells if steps[0] <= spell.raised <= steps[-1]}
    return sorted(marks) + [(step, ALARM) for step in sorted(alarms)]


def _of_loss(folder: Path, history: History, marks: Marks) -> Shown:
    from launch import plots

    if not _known(history, "loss"):
        return []
    figure = history.figures
    plots.save_loss(
        folder / "loss.png", history.steps, figure["loss"], figure["mtp_loss"], figure["heldout_loss"], marks
    )
    caption = "Mean cross-entropy of the global batch. Dotted lines are events, triangles alarms."
    if _known(history, "heldout_loss"):
        caption += " Points: the held-out documents, each token predicted once, by the weights behind that step."
    return [("Loss", "loss.png", caption)]


def _of_balance(folder: Path, history: History, spells: Sequence[Spell], layers: Sequence[str], marks: Marks) -> Shown:
    from launch import balance_plots as plots

    steps, figure = history.steps, history.figures
    shown: Shown = []
    if _known(history, "max_vio"):
        balance = (figure["max_vio"], figure["max_vio_rank"], figure["max_vio_floor"])
        plots.save_balance(folder / "max_vio.png", steps, *balance, marks)
        shown.append((
            "Balance", "max_vio.png",
            "max_vio averaged over the MoE layers (arXiv 2408.15664). The floor is sqrt(2 ln E * E / (T K)) for E "
            "experts and T K routed choices a step: what a perfectly fair router shows by chance.",
        ))  # fmt: skip
    if len(history.layer_steps) and len(layers) == history.layers["max_vio"].shape[1]:
        rows = {name: row for row, name in enumerate(layers)}
        spans = [(rows[spell.layer], spell.since, steps[-1] if spell.ended is None else spell.ended - 1)
                 for spell in spells if spell.alarm == "max_vio" and spell.layer in rows]  # fmt: skip
        layered = (history.layer_steps, history.layers["max_vio"], history.layer_floor, layers)
        plots.save_balance_of_layers(folder / "max_vio_layers.png", *layered, spans)
        shown.append(
            (
                "Balance of each layer",
                "max_vio_layers.png",
                "The same figure layer by layer." + _drawn(history.layers_from),
            )
        )
    if len(history.loads):
        plots.save_load_heat_maps(folder / "loads.png", history.drawn_steps, history.loads, layers)
        shown.append(
            ("Loads", "loads.png", f"{len(history.drawn_steps)} steps are drawn." + _drawn(history.drawn_from))
        )
    if len(history.layer_steps) and (history.layers["dead_experts"] > 0).any():
        plots.save_dead(folder / "dead.png", history.layer_steps, history.layers["dead_experts"], layers, marks)
        caption = "How many experts of each layer got no token in a step." + _drawn(history.layers_from)
        shown.append(("Dead experts", "dead.png", caption))
    if len(history.loads) and np.isfinite(history.bias[-1]).all():
        plots.save_bias(folder / "bias.png", history.drawn_steps, history.bias, layers)
        shown.append((
            "Bias", "bias.png",
            "Drawn against the layer's median expert, since only differences change a choice. One that keeps climbing "
            "belongs to an expert that few tokens want." + _common_drift(history),
        ))  # fmt: skip
    waiting = 100.0 * np.divide(figure["waiting_seconds"], figure["step_seconds"], where=figure["step_seconds"] > 0,
                                out=np.full(len(steps), np.nan))  # fmt: skip
    if max(np.nanmax(one, initial=0.0) for one in (figure["max_vio_rank"], waiting)) > 0:  # else a single rank
        plots.save_ranks(
            folder / "ranks.png", steps, figure["max_vio_rank"], waiting, figure["bytes_sent"] / 2**20, marks
        )
        shown.append((
            "Ranks", "ranks.png",
            "The busiest rank sets the step time. Waiting is the time in all-to-all beyond that of the rank that spent "
            "least there, as a mean over ranks.",
        ))  # fmt: skip
    return shown


def _of_router(
    folder: Path,
    history: History,
    pairs: tuple[int, list[str], np.ndarray] | None,
    layers: Sequence[str],
    marks: Marks,
) -> Shown:
    from launch import balance_plots as plots

    shown: Shown = []
    if len(history.layer_steps) and len(history.loads):
        changed, entropy = history.layers["changed_by_bias_share"], history.layers["gate_entropy"]
        if np.isfinite(changed).any():
            plots.save_by_layer(
                folder / "changed.png", "Choices that the bias changed", "% of choices",
                history.layer_steps, 100.0 * changed, layers, marks,
            )  # fmt: skip
            caption = "The share of choices that would have fallen on other experts without the bias."
            shown.append(("What the bias changes", "changed.png", caption))
        if np.isfinite(entropy).any():
            bound = float(np.log(history.loads.shape[2]))
            plots.save_by_layer(
                folder / "entropy.png", "Gate entropy", "nats a token",
                history.layer_steps, entropy, layers, marks, (bound, f"ln E = {bound:.2f}"),
            )  # fmt: skip
            shown.append((
                "Gate entropy", "entropy.png",
                "Entropy of a token's scores over the experts, as a mean. At ln E the scores do not tell experts "
                "apart; near zero each token has one expert far in front.",
            ))  # fmt: skip
    if pairs is not None:
        step, names, counts = pairs
        plots.save_pairs(folder / "pairs.png", step, counts, names)
        shown.append((
            "Experts chosen together", "pairs.png",
            "1 is what the loads of the two experts alone would give. Grey: an expert with itself, or without a token. "
            "Squares along the diagonal are groups, where routing is limited to some groups of experts.",
        ))  # fmt: skip
    return shown


def _of_speed(folder: Path, history: History, marks: Marks) -> Shown:
    from launch import plots

    steps, figure = history.steps, history.figures
    shown: Shown = []
    if _known(history, "tokens_per_second"):
        plots.save_speed(folder / "speed.png", steps, figure["tokens_per_second"], marks)
        shown.append(("Throughput", "speed.png", "All ranks together."))
    if _known(history, "step_seconds"):
        waits = {"waiting for data": figure["data_wait_seconds"], "all-to-all": figure[waiting_name(figure)]}
        plots.save_time_shares(folder / "time.png", steps, figure["step_seconds"], waits, marks)
        shown.append(("Waiting inside the steps", "time.png", "Shares of each step's time on rank 0."))
    if _known(history, "memory_gib"):
        plots.save_memory(folder / "memory.png", steps, figure["memory_gib"], marks)
        shown.append(("Memory", "memory.png", "The largest so far on rank 0; a line that keeps climbing is a leak."))
    return shown


def _drawn(of_steps: int) -> str:
    """What the pictures of layers leave out, where they do."""
    return f" Of each {of_steps} steps the least even is drawn." if of_steps > 1 else ""


def _common_drift(history: History) -> str:
    """How far the median bias went, where it is worth a sentence."""
    medians = np.median(history.bias[-1], axis=1)  # (L,)
    far = float(medians[np.abs(medians).argmax()])
    spread = float((history.bias[-1].max(axis=1) - history.bias[-1].min(axis=1)).max())
    if abs(far) <= 0.1 * spread:
        return ""
    return f" All experts together moved by up to {far:+.3f}, which changes nothing."


def _known(history: History, name: str) -> bool:
    return bool(np.isfinite(history.figures[name]).any())
