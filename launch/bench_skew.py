"""How many updates each bias rule needs from a strongly skewed router: a router that stands still, tokens drawn anew.

Nothing is trained: logits of every step are normal numbers around fixed means, one of which lies several logits above
the others. Choice, histogram and Balancer are those of training.
"""

# T tokens a step, E routed experts, K top-k

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cluster.context import EXIT_OK
from launch import balance_stats
from launch.bench_balance_arms import Rule
from launch.bench_record import machine, write_record
from launch.output import print_json
from model.bias_histogram import bias_needed, histogram
from model.config import ModelConfig
from model.router import choose_experts, count_tokens
from model.routing_stats import LayerStats, stack_layers
from parallel.balance import Balancer
from parallel.communicator import SingleCommunicator
from parallel.config import BalanceConfig

WITHIN = 1.3  # times the noise floor
FAVOUR = 5.0  # logits
SPREAD = 0.5  # standard deviation of the experts' mean logits; that of a token's logits around them is 1
LAST = 50  # updates over which the end is averaged


@dataclass(frozen=True)
class Shape:
    """A layer and its batch; `n_group` of 1 is no group limit."""

    n_experts: int
    top_k: int
    n_tokens: int
    n_group: int = 1
    topk_group: int = 1

    @property
    def model(self) -> ModelConfig:
        """What the router reads of a model's configuration."""
        return ModelConfig(
            n_routed_experts=self.n_experts, num_experts_per_tok=self.top_k, n_group=self.n_group,
            topk_group=self.topk_group,
        )  # fmt: skip

    @property
    def floor(self) -> float:
        """max_vio that chance leaves in a batch."""
        return balance_stats.noise_floor(self.n_experts, self.n_tokens * self.top_k)

    def __str__(self) -> str:
        groups = "" if self.n_group == 1 else f", {self.topk_group} of {self.n_group} groups"
        return f"E {self.n_experts} K {self.top_k} T {self.n_tokens:,}{groups}"


SHAPES = (Shape(64, 6, 8192), Shape(64, 6, 8192, 8, 4), Shape(256, 8, 16384), Shape(256, 8, 16384, 8, 4))
# Rule, rate, and the most updates: a slow rule gets the time that it needs.
ENTRIES: Sequence[tuple[Rule, float, int]] = (
    ("quantile", 1.0, 100), ("proportional", 1e-2, 400), ("sign", 1e-2, 400), ("sign", 1e-3, 1200), ("none", 0.0, 60),
)  # fmt: skip


def run_skew(out: Path, as_json: bool) -> int:
    """Prints the table and writes skew.csv, skew.json and skew.png."""
    rows, curves = [], []
    for shape in SHAPES:
        for rule, rate, updates in ENTRIES:
            curve = max_vio_by_update(shape, BalanceConfig(rule=rule, rate=rate), updates)
            rows.append(_row(shape, rule, rate, curve))
            curves.append(curve)
            print(_line(rows[-1]), flush=True)
    facts: dict[str, Any] = {
        "benchmark": "skew", "favour_logits": FAVOUR, "within": WITHIN, "machine": machine(("torch",)),
    }  # fmt: skip
    write_record(out, "skew", rows, facts)
    _plot(rows, curves, out / "skew.png")
    print(f"updates: until max_vio of fresh tokens is at most {WITHIN} times the floor; end: mean of the last {LAST}")
    print("aux_loss has no entry: it acts through the router's gradient, and this router is not trained")
    if as_json:
        print_json(json.loads((out / "skew.json").read_text(encoding="utf-8")))
    return EXIT_OK


def max_vio_by_update(shape: Shape, config: BalanceConfig, updates: int, seed: int = 0) -> list[float]:
    """max_vio after 0, 1, ..., `updates` moves of the bias, each on tokens that no move has seen.

    Expert 0 is the favoured one. Stops early, `LAST` updates after max_vio has come within `WITHIN` times the floor.
    """
    draw = torch.Generator().manual_seed(seed)
    means = SPREAD * torch.randn(shape.n_experts, generator=draw)
    means[0] += FAVOUR
    bias = torch.zeros(shape.n_experts)
    balancer = Balancer([bias], config, SingleCommunicator())
    found: list[float] = []
    reached = updates
    for number in range(updates + 1):
        scores = torch.randn(shape.n_tokens, shape.n_experts, generator=draw).add_(means).sigmoid_()
        counts = count_tokens(choose_experts(scores, bias, shape.model).view(1, -1), shape.n_experts)
        found.append(balance_stats.max_vio(counts))
        if found[-1] <= WITHIN * shape.floor:
            reached = min(reached, number)
        if number == min(updates, reached + LAST):
            break
        needs = histogram(bias_needed(scores + bias, shape.model)) if balancer.wants_histogram else None
        balancer.add(stack_layers([_stats(counts[0], needs)], 1, shape.n_experts, torch.device("cpu")))
        balancer.step(number)
    return found


def _stats(counts: torch.Tensor, needs: torch.Tensor | None) -> LayerStats:
    """Statistics of a layer of which the balancer reads only these two."""
    nothing = torch.zeros(())
    needs = counts.new_zeros(len(counts), 0) if needs is None else needs
    return LayerStats(counts, nothing, nothing.long(), torch.zeros(len(counts)), nothing, needs, counts.new_zeros(0, 0))


def updates_until(curve: Sequence[float], limit: float) -> int | None:
    """Updates until max_vio is first at most `limit`; None if it never is."""
    return next((number for number, value in enumerate(curve) if value <= limit), None)


def _row(shape: Shape, rule: str, rate: float, curve: list[float]) -> dict[str, Any]:
    return {
        "shape": str(shape), "n_experts": shape.n_experts, "top_k": shape.top_k, "n_tokens": shape.n_tokens,
        "n_group": shape.n_group, "topk_group": shape.topk_group, "rule": rule, "rate": rate, "floor": shape.floor,
        "max_vio_start": curve[0], "max_vio_1": curve[1], "max_vio_5": curve[5],
        "updates": updates_until(curve, WITHIN * shape.floor), "max_vio_end": fmean(curve[-LAST:]),
        "updates_run": len(curve) - 1,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    updates = f"{row['updates']:>5} updates" if row["updates"] is not None else f"not in {row['updates_run']}"
    return (
        f"{row['shape']:<38}floor {row['floor']:.3f}  {row['rule']:<13}{row['rate'] or '':<6} start "
        f"{row['max_vio_start']:6.2f}  after 5 {row['max_vio_5']:6.3f}  {updates:<14} end {row['max_vio_end']:.3f}"
    )


def _plot(rows: Sequence[dict[str, Any]], curves: Sequence[list[float]], path: Path) -> None:
    """max_vio over updates, a panel a shape, both axes logarithmic; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    from launch.plots import BLUE, GREEN, GREY, ORANGE

    colours = {"quantile": ORANGE, "proportional": GREEN, "sign": BLUE, "none": GREY}
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, shape in zip(panels, dict.fromkeys(row["shape"] for row in rows), strict=False):
        for row, curve in zip(rows, curves, strict=True):
            if row["shape"] == shape:
                style = ":" if (row["rule"], row["rate"]) == ("sign", 1e-2) else "-"
                label = f"{row['rule']} {row['rate']:g}" if row["rate"] else row["rule"]
                axes.plot(
                    range(1, len(curve) + 1), curve, style, color=colours[row["rule"]], linewidth=1.4, label=label
                )
        floor = next(row["floor"] for row in rows if row["shape"] == shape)
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="noise floor")
        axes.set_title(shape, loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center",
                  ncols=6)  # fmt: skip
    for axes in figure.axes[2:]:
        axes.set_xlabel("updates + 1")
    for axes in figure.axes[::2]:
        axes.set_ylabel("max_vio")
    figure.suptitle("From one expert favoured by 5 logits", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)
