"""A run's record files as columns: figures a step, figures of the layers, loads, biases, alarms, and their summary."""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launch.balance_stats import max_vio_per_layer
from launch.charts import PER_LAYER
from launch.runfolder import REWIND, RunFolder

MAX_DRAWN_STEPS = 480  # steps whose loads and biases are drawn; more would be narrower than a pixel
MAX_LAYER_STEPS = 4096  # steps whose figures of the layers are drawn as lines
MAX_RECENT_STEPS = 20  # the last steps, each of them, for what is said of a run's end
FIGURES = (
    "loss", "mtp_loss", "grad_norm", "tokens_per_second", "step_seconds", "data_wait_seconds", "all_to_all_seconds",
    "exposed_all_to_all_seconds", "waiting_seconds", "bytes_sent", "mfu", "memory_gib", "max_vio", "max_vio_rank",
    "max_vio_floor", "dead_experts",
    "bias_abs_max", "bias_rate", "changed_by_bias_share", "gate_entropy", "tokens",
    "heldout_loss", "heldout_bits_per_byte",
)  # fmt: skip


@dataclass(frozen=True)
class History:
    """A run's committed steps as columns; figures that a step lacks are NaN.

    steps: (n,) int64 ascending; figures: each of FIGURES as (n,) float64; last: the last record.
    layer_steps: (N,) int64; layers: each of charts.PER_LAYER as (N, L) float64; layer_floor: (N,).
    drawn_steps: (M,) int64, of the steps whose loads are known; loads: (M, L, E) int64; bias: (M, L, E) float64, NaN
    where there is none. Of a long run N and M steps are drawn, each the least even of ``layers_from`` and
    ``drawn_from`` consecutive ones, so that no spike is lost.
    recent_layers, recent_floor, recent_loads: the same figures of the last W steps, every one of them: a tenth of the
    run, at most MAX_RECENT_STEPS.
    placement: (L, E) int64 of the last step whose loads are known, None where experts lie in order.
    """

    steps: np.ndarray
    figures: dict[str, np.ndarray]
    last: dict[str, Any]
    layer_steps: np.ndarray
    layers: dict[str, np.ndarray]
    layer_floor: np.ndarray
    drawn_steps: np.ndarray
    loads: np.ndarray
    bias: np.ndarray
    layers_from: int
    drawn_from: int
    recent_layers: dict[str, np.ndarray]
    recent_floor: np.ndarray
    recent_loads: np.ndarray
    placement: np.ndarray | None


class Thinned:
    """Of every ``stride`` consecutive steps the one with the largest weight, ``stride`` growing so that at most
    ``most`` are held; and the last MAX_RECENT_STEPS steps, each of them.

    Every n-th step instead would show spikes that come at another rhythm never, and those of its own always.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        self.recent: deque[tuple[np.ndarray, ...]] = deque(maxlen=MAX_RECENT_STEPS)
        self._kept: list[_Kept] = []
        self._n_added = 0

    def add(self, step: int, weight: float, *arrays: np.ndarray) -> None:
        """Takes one step's arrays; those of a step with other shapes than the last are left out at the end."""
        self._n_added += 1
        self.recent.append(arrays)
        one = _Kept(step, -math.inf if math.isnan(weight) else weight, 1, arrays)
        if self._kept and self._kept[-1].n_steps < self.stride:
            self._kept[-1] = self._kept[-1].merged(one)
        else:
            self._kept.append(one)
        if len(self._kept) > self.most:
            pairs = zip(self._kept[::2], [*self._kept[1::2], None], strict=False)
            self._kept = [first if second is None else first.merged(second) for first, second in pairs]
            self.stride *= 2

    def columns(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The kept steps, and each of the ``number`` arrays stacked over them."""
        kept = [one for one in self._kept if one.arrays[0].shape == self._kept[-1].arrays[0].shape]
        stacks = [np.array([one.arrays[i] for one in kept]) for i in range(number)]
        return np.array([one.step for one in kept], dtype=np.int64), stacks

    def recent_columns(self, number: int) -> list[np.ndarray]:
        """Each of the ``number`` arrays stacked over the last tenth of the steps, at most MAX_RECENT_STEPS."""
        window = min(MAX_RECENT_STEPS, -(-self._n_added // 10))
        recent = [arrays for arrays in list(self.recent)[len(self.recent) - window :]
                  if arrays[0].shape == self.recent[-1][0].shape]  # fmt: skip
        return [np.array([arrays[i] for arrays in recent]) for i in range(number)]


@dataclass(frozen=True)
class _Kept:
    """The step with the largest weight of n_steps consecutive ones."""

    step: int
    weight: float
    n_steps: int
    arrays: tuple[np.ndarray, ...]

    def merged(self, later: "_Kept") -> "_Kept":
        """The step with the larger weight, the later one of two equal ones, standing for both runs of steps."""
        larger = self if self.weight > later.weight else later
        return replace(larger, n_steps=self.n_steps + later.n_steps)


def read_history(run: RunFolder) -> History:
    """Reads metrics.jsonl in one pass; memory grows with the figures, not with the layers or experts."""
    steps: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in FIGURES}
    layers, loads = Thinned(MAX_LAYER_STEPS), Thinned(MAX_DRAWN_STEPS)
    last: dict[str, Any] = {}
    placement = None
    for last in run.committed("metrics"):
        steps.append(last["step"])
        for name, column in columns.items():
            column.append(math.nan if last.get(name) is None else last[name])
        if last.get("max_vio_per_layer"):
            n_layers = len(last["max_vio_per_layer"])
            rows = [np.array(last.get(f"{key}_per_layer") or [math.nan] * n_layers, np.float64) for key in PER_LAYER]
            worst = float(np.nan_to_num(rows[0]).max(initial=0.0))
            layers.add(steps[-1], worst, *rows, np.array(columns["max_vio_floor"][-1]))
        if last.get("tokens_per_expert"):
            counts = np.array(last["tokens_per_expert"], dtype=np.int64)
            bias = last.get("expert_bias")
            least_even = float(np.nan_to_num(max_vio_per_layer(counts)).max(initial=0.0))
            loads.add(steps[-1], least_even, counts, np.array(bias if bias else counts * math.nan, dtype=np.float64))
            placement = np.array(last["placement"], dtype=np.int64) if last.get("placement") else None
    layer_steps, layer_columns = layers.columns(len(PER_LAYER) + 1)
    drawn_steps, drawn = loads.columns(2)
    recent = layers.recent_columns(len(PER_LAYER) + 1)
    return History(
        np.array(steps, dtype=np.int64),
        {name: np.array(column, dtype=np.float64) for name, column in columns.items()},
        last,
        layer_steps,
        dict(zip(PER_LAYER, layer_columns[:-1], strict=True)),
        layer_columns[-1],
        drawn_steps,
        drawn[0].astype(np.int64),
        drawn[1],
        layers.stride,
        loads.stride,
        dict(zip(PER_LAYER, recent[:-1], strict=True)),
        recent[-1],
        loads.recent_columns(1)[0].astype(np.int64),
        placement,
    )


@dataclass(frozen=True)
class Spell:
    """An alarm from its raising to its end, as far as they are part of the run.

    since: the first step at which the condition held; raised: the step of the alarm; ended: None while it is on.
    """

    alarm: str
    layer: str
    expert: int | None
    rank: int | None
    value: float
    limit: float
    action: str
    since: int
    raised: int
    ended: int | None


def alarm_spells(events: Sequence[Mapping[str, Any]]) -> list[Spell]:
    """The run's alarms in the order of raising; those of steps that were rolled back are left out."""
    raised: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == REWIND:
            raised = [spell for spell in raised if spell["raised"] <= event["step"]]
            for spell in raised:
                if spell["ended"] is not None and spell["ended"] > event["step"]:
                    spell["ended"] = None
        elif event["kind"] == "alarm":
            place = {name: event.get(name) for name in ("alarm", "layer", "expert", "rank")}
            if not event["ended"]:
                known = {name: event[name] for name in ("value", "limit", "action", "since")}
                raised.append({**place, **known, "raised": event["step"], "ended": None})
                continue
            of_expert = event["alarm"] == "dead_expert"  # the busiest expert or rank may be another at the end
            for spell in raised:
                same = spell["alarm"] == event["alarm"] and spell["layer"] == event["layer"]
                if same and spell["ended"] is None and (not of_expert or spell["expert"] == event.get("expert")):
                    spell["ended"] = event["step"]
    return [Spell(**spell) for spell in raised]


def read_pairs(run: RunFolder, last_step: int) -> tuple[int, list[str], np.ndarray] | None:
    """Step, layer names and (L, E, E) int64 counts of coactivation.json.

    None where the run has no such file, or where it is of a step that was rolled back and not done again.
    """
    if not run.coactivation.is_file():
        return None
    record = json.loads(run.coactivation.read_text(encoding="utf-8"))
    pairs = np.array(record["pairs"], dtype=np.int64)
    return (record["step"], record["layers"], pairs) if record["step"] <= last_step and pairs.ndim == 3 else None


def summarize_history(history: History) -> dict[str, Any]:
    """A run in a few numbers; None where a figure was never measured.

    ``loss_first`` is the first step's. ``loss_last``, ``mtp_loss_last``, ``max_vio_first``, ``max_vio_last`` and
    the other ``..._last`` are means over ``window_steps``: a tenth of the run, at most 20 steps; those of held-out
    documents are the newest ones, of evaluations in the course of training. Shares are of the
    summed step time. Speed, MFU and bytes are medians over the steps, so that a save or a warm-up does not move them.
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
        "heldout_loss_last": _last(figure["heldout_loss"]),
        "heldout_bits_per_byte_last": _last(figure["heldout_bits_per_byte"]),
        "mtp_loss_last": _mean(figure["mtp_loss"][-window:]),
        "tokens_per_second": _percentile(figure["tokens_per_second"], 50),
        "tokens_per_second_p10": _percentile(figure["tokens_per_second"], 10),
        "tokens_per_second_p90": _percentile(figure["tokens_per_second"], 90),
        "mfu": _percentile(figure["mfu"], 50),
        "memory_gib": _percentile(figure["memory_gib"], 100),
        "data_wait_share": share("data_wait_seconds"),
        "all_to_all_share": share(waiting_name(figure)),
        "waiting_share": share("waiting_seconds"),
        "bytes_sent": _percentile(figure["bytes_sent"], 50),
        "max_vio_first": _mean(figure["max_vio"][:window]),
        "max_vio_last": _mean(figure["max_vio"][-window:]),
        "max_vio_floor": _mean(figure["max_vio_floor"][-window:]),
        "max_vio_rank_last": _mean(figure["max_vio_rank"][-window:]),
        "dead_experts_last": _mean(figure["dead_experts"][-window:]),
        "changed_by_bias_last": _mean(figure["changed_by_bias_share"][-window:]),
        "gate_entropy_last": _mean(figure["gate_entropy"][-window:]),
        "bias_abs_max": _mean(figure["bias_abs_max"][-1:]),
        "world_size": history.last.get("world_size"),
    }


def waiting_name(figure: Mapping[str, np.ndarray]) -> str:
    """The time that steps stood still for all-to-all; older records have only its whole time, which was the same."""
    exposed = "exposed_all_to_all_seconds"
    return exposed if np.isfinite(figure[exposed]).any() else "all_to_all_seconds"


def _last(values: np.ndarray) -> float | None:
    """The newest that was measured."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _percentile(values: np.ndarray, percent: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percent)) if known.size else None
