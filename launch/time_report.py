"""The report's section on time: where it went, kind by kind, and a picture of the launches with their faults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.accounting import KINDS, Account, Timeline, in_words, spent
from launch.console import duration

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers
    "productive": "#009E73", "lost": "#D55E00", "saving": "#0072B2", "starting": "#F0E442", "stopping": "#999999",
    "evaluation": "#CC79A7",
}  # fmt: skip
MAX_ROWS = 12  # launches in the picture, the last ones
MAX_CAUSES = 8  # faults of one launch whose causes stand beside their marks
MEANING = {
    "productive": "steps that are part of the history",
    "lost": "steps done again, rolled back or skipped; from a fault to the next start",
    "saving": "training stood still for a checkpoint",
    "starting": "processes, rendezvous, assembly, loading, first batch, warm-up and compilation",
    "stopping": "from the last step or save to the end of the launcher",
    "evaluation": "held-out documents, during training and behind its end",
}


def time_section(folder: Path, account: Account | None) -> list[str]:
    """Lines of Markdown; the picture goes to `folder`. Empty where the run's records do not tell.

    Without matplotlib there is no picture.
    """
    if account is None or not account.wall_ms:
        return []
    lines = ["## Where the run's time went", "", f"{in_words(account)}.", "", "| kind | time | share | what it is |",
             "|---|---|---|---|"]  # fmt: skip
    for kind in KINDS:
        own = account.milliseconds[kind]
        lines.append(f"| {kind} | {spent(own)} | {100 * own / account.wall_ms:.1f}% | {MEANING[kind]} |")
    lines += [f"| all | {spent(account.wall_ms)} | 100% | {_launches(account)} |", ""]
    if account.lost_steps or account.skipped_steps:
        lines += [f"{account.lost_steps} steps were done and given up, {account.skipped_steps} were skipped.", ""]
    if account.open:
        lines += ["The last launch has not told its end: under way, or killed. It counts to its last step.", ""]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return lines
    folder.mkdir(exist_ok=True)
    save_timeline(folder / "timeline.png", account.timelines)
    caption = "One bar a launch, from its start. Triangles: faults, at the failed rank's last sign."
    return [*lines, "![Where the run's time went](plots/timeline.png)", "", caption, ""]


def _launches(account: Account) -> str:
    many = len(account.timelines) > 1
    text = f"{len(account.timelines)} launch{'es' if many else ''}, {account.generations} start(s) of the ranks"
    return f"{text}; between launches {duration(account.idle_seconds)}" if many else text


def save_timeline(path: Path, timelines: Sequence[Timeline]) -> None:
    """A bar for each launch, coloured by kind, with its faults."""
    from matplotlib.figure import Figure

    shown = list(enumerate(timelines, start=1))[-MAX_ROWS:]
    longest = max(timeline.ended for _, timeline in shown)
    units = ((1e3, 300e3, "seconds"), (60e3, 3 * 3600e3, "minutes"), (3600e3, float("inf"), "hours"))
    unit, name = next((unit, name) for unit, below, name in units if longest < below)
    figure = Figure(figsize=(8.6, 1.9 + 0.75 * len(shown)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle("Where the run's time went", x=0.01, ha="left", fontweight="bold")
    for row, (_, timeline) in enumerate(shown):
        for kind in KINDS:
            of_kind = [span for span in timeline.spans if span.kind == kind]
            bars = [(span.began / unit, (span.ended - span.began) / unit) for span in of_kind]
            axes.broken_barh(bars, (row - 0.3, 0.6), facecolors=COLOURS[kind], linewidth=0)
        _mark_faults(axes, row, timeline, unit, longest)
    axes.set_yticks(range(len(shown)), [f"launch {number}" for number, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.75)
    axes.set_xlim(0, longest / unit)
    axes.set_xlabel(f"{name} since the launch began")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    there = [kind for kind in KINDS if any(span.kind == kind for _, timeline in shown for span in timeline.spans)]
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[kind], label=kind) for kind in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path)


def _mark_faults(axes: Any, row: int, timeline: Timeline, unit: float, longest: int) -> None:
    """Triangles above the bar; the causes beside those that have room for them."""
    axes.plot([fault.at / unit for fault in timeline.faults], [row - 0.38] * len(timeline.faults), "v", color="black",
              markersize=5, clip_on=False)  # fmt: skip
    free_from = -1.0
    for fault in timeline.faults[:MAX_CAUSES]:
        if fault.at < free_from:
            continue
        right = fault.at > 0.85 * longest
        axes.annotate(fault.cause, (fault.at / unit, row - 0.38), xytext=(-5 if right else 5, 1), fontsize=8,
                      textcoords="offset points", ha="right" if right else "left", va="center")  # fmt: skip
        free_from = fault.at + 0.1 * longest
