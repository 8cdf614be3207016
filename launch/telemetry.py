"""One record a step: derives the balance figures and writes metrics.jsonl, TensorBoard and the console from it.

Used by rank 0 alone; the same calls on another rank (``main=False``) do nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from launch import balance_stats
from launch.console import Console, Mode
from launch.runfolder import RunFolder, utc_now
from launch.tensorboard import TensorBoard

if TYPE_CHECKING:
    import torch

CONTRACT_KEYS = (
    "step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu", "memory_gib",
    "data_wait_seconds", "all_to_all_seconds", "max_vio", "max_vio_rank", "dead_experts", "bias_abs_max", "world_size",
)  # fmt: skip
# Up to so many experts in all layers together, every record holds each expert's load and bias (about 20 bytes each);
# larger models (58 x 256 would be 300 kB a step) have them in every ``loads_every``-th record.
LOADS_EVERY_STEP_LIMIT = 2048
GROUP_OF_KEY = {  # the headings under which TensorBoard shows the figures
    "loss": "train", "mtp_loss": "train", "sequence_balance": "train", "grad_norm": "train", "lr": "train",
    "step_seconds": "speed", "tokens_per_second": "speed", "mfu": "speed", "data_wait_seconds": "speed",
    "all_to_all_seconds": "speed", "exposed_all_to_all_seconds": "speed", "memory_gib": "memory",
    "max_vio": "balance", "max_vio_rank": "balance", "max_vio_floor": "balance",
    "dead_experts": "balance", "bias_abs_max": "balance",
    "changed_by_bias_share": "balance", "tokens": "progress", "epoch": "progress", "world_size": "progress",
}  # fmt: skip


@dataclass(frozen=True)
class StepRecord:
    """What one completed optimizer step measured; figures of the global batch, times of rank 0 unless said otherwise.

    step: completed optimizer steps, 1 after the first.
    tokens: trained on so far, over all ranks and all starts of the run.
    loss, mtp_loss: mean cross-entropy a token in nats; mtp_loss None without multi-token prediction.
    sequence_balance: the sequence-wise balance loss before its coefficient; None without MoE layers.
    grad_norm: the true global norm before clipping.
    mfu: fraction of the hardware's peak, None where the peak is not known.
    all_to_all_seconds: from each transfer's start until it was taken, added up; exposed_all_to_all_seconds: of these
        the time that nothing else was done, None where not measured.
    memory_gib: the largest so far, of whatever the accelerator (or this process on a CPU) holds.
    tokens_per_expert: (n_layers, E) int64, routed choices of the global batch; (0, 0) for a dense model.
    expert_bias: (n_layers, E) fp32, the bias that the step's balancer left behind; None for rules without one.
    changed_by_bias: (n_layers,) int64, choices that differ from those without bias; None where not counted.
    extra: further figures under names of their own, for metrics.jsonl; numbers also go to TensorBoard.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    step_seconds: float
    tokens_per_second: float
    memory_gib: float
    data_wait_seconds: float
    all_to_all_seconds: float
    world_size: int
    ep_size: int
    tokens_per_expert: "torch.Tensor | np.ndarray"
    expert_bias: "torch.Tensor | np.ndarray | None" = None
    changed_by_bias: "torch.Tensor | np.ndarray | None" = None
    mfu: float | None = None
    mtp_loss: float | None = None
    sequence_balance: float | None = None
    exposed_all_to_all_seconds: float | None = None
    epoch: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def derive(record: StepRecord, with_loads: bool = True) -> dict[str, Any]:
    """The step's object for metrics.jsonl: the contract's keys, and what else the report draws from.

    Figures that do not exist for this model are None (max_vio of a dense one); those that went wrong stay NaN or inf.

    Raises: ValueError for counts of a wrong shape, or an ``extra`` that would overwrite a figure.
    """
    counts = balance_stats.as_array(record.tokens_per_expert)
    per_layer = balance_stats.max_vio_per_layer(counts)
    dense = counts.size == 0
    rows = int(counts.sum())
    bias = None if record.expert_bias is None else balance_stats.as_array(record.expert_bias)
    changed = None if record.changed_by_bias is None else int(balance_stats.as_array(record.changed_by_bias).sum())
    figures: dict[str, Any] = {
        "step": int(record.step),
        "time": utc_now(),
        "epoch": int(record.epoch),
        "tokens": int(record.tokens),
        "loss": float(record.loss),
        "mtp_loss": _float(record.mtp_loss),
        "sequence_balance": _float(record.sequence_balance),
        "grad_norm": float(record.grad_norm),
        "lr": float(record.lr),
        "step_seconds": _rounded(record.step_seconds),
        "tokens_per_second": _rounded(record.tokens_per_second),
        "mfu": _float(record.mfu),
        "memory_gib": _rounded(record.memory_gib),
        "data_wait_seconds": _rounded(record.data_wait_seconds),
        "all_to_all_seconds": _rounded(record.all_to_all_seconds),
        "exposed_all_to_all_seconds": (
            None if record.exposed_all_to_all_seconds is None else _rounded(record.exposed_all_to_all_seconds)
        ),
        "world_size": int(record.world_size),
        "ep_size": int(record.ep_size),
        "max_vio": None if dense else _rounded(balance_stats.max_vio(counts)),
        "max_vio_rank": None if dense else _rounded(balance_stats.max_vio_rank(counts, record.ep_size)),
        "max_vio_floor": None if dense else _rounded(balance_stats.max_vio_floor(counts)),
        "max_vio_per_layer": np.round(per_layer, 6).tolist(),
        "dead_experts": int(balance_stats.dead_experts(counts).sum()),
        "bias_abs_max": 0.0 if bias is None or bias.size == 0 else float(np.abs(bias).max()),
        "changed_by_bias_share": changed / rows if changed is not None and rows else None,
    }
    if with_loads and not dense:
        figures["tokens_per_expert"] = counts.tolist()
        figures["expert_bias"] = None if bias is None else _shortest(bias)
    taken = sorted(figures.keys() & record.extra.keys())
    if taken:
        raise ValueError(f"StepRecord.extra would overwrite {', '.join(taken)}; give these figures other names")
    return {**figures, **record.extra}


class Telemetry:
    """The one place where a run's figures and events go out.

    Args:
        run: the run's folder, created.
        config: the resolved configuration as nested mappings; its ``model`` section names the layers, and all of it is
            shown under TensorBoard's Text tab.
        console, tensorboard: where the figures are shown and drawn.
        main: whether this is rank 0.
        heatmap_every: steps between load heat maps and bias histograms in TensorBoard (and one at the first step).
        loads_every: steps between the records that hold every expert's load and bias; None is every step for models
            with up to 2048 routed experts over all layers, else ``heatmap_every``.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        console: Console,
        tensorboard: TensorBoard,
        main: bool = True,
        *,
        heatmap_every: int = 20,
        loads_every: int | None = None,
    ):
        self.run, self.console, self.tensorboard, self.main = run, console, tensorboard, main
        self._config = config
        self._heatmap_every, self._loads_every = heatmap_every, loads_every
        self._layer_names: list[str] | None = None
        if main:
            tensorboard.text(0, "configuration", config_markdown(config))

    @classmethod
    def open(
        cls,
        run: RunFolder,
        config: Mapping[str, Any],
        *,
        total_steps: int,
        main: bool,
        console_mode: Mode = "auto",
        heatmap_every: int = 20,
    ) -> "Telemetry":
        """Telemetry with its console and TensorBoard for a created run folder; off altogether where not ``main``."""
        console = Console(total_steps, mode=console_mode if main else "off")
        tensorboard = TensorBoard(run.tensorboard, say=console.note, open_file=main)
        return cls(run, config, console, tensorboard, main, heatmap_every=heatmap_every)

    def log_step(self, record: StepRecord) -> None:
        """Writes one step everywhere. Raises: OSError when metrics.jsonl cannot be written."""
        if not self.main:
            return
        first = self._layer_names is None
        counts = balance_stats.as_array(record.tokens_per_expert)
        if self._layer_names is None:
            self._layer_names = balance_stats.layer_names(self._config, counts.shape[0])
        every = self._loads_every or (1 if counts.size <= LOADS_EVERY_STEP_LIMIT else self._heatmap_every)
        figures = derive(record, with_loads=first or record.step % every == 0)
        self.run.metrics.append(figures)
        self.console.step(figures)
        if self.tensorboard.available:
            self.tensorboard.scalars(record.step, scalar_tags(figures, self._layer_names))
            if counts.size and (first or record.step % self._heatmap_every == 0):
                self._draw(record, counts)

    def event(self, kind: str, *, cause: str, **fields: Any) -> None:
        """Writes one event to events.jsonl, and a line of it to the console; see ``RunFolder.event``."""
        if self.main:
            self.console.note(event_line(self.run.event(kind, cause=cause, **fields)))

    def evaluation(self, step: int, figures: Mapping[str, float], *, cause: str) -> None:
        """Writes figures of an evaluation after ``step`` as an event and under TensorBoard's ``evaluation`` heading."""
        if self.main:
            self.event("evaluation", cause=cause, step=step, **figures)
            self.tensorboard.scalars(step, {f"evaluation/{name}": value for name, value in figures.items()})

    def rewind(self, step: int, *, cause: str) -> None:
        """Goes on from ``step`` completed steps: later ones no longer count, in the files and in TensorBoard."""
        if self.main:
            dropped = self.run.rewind(step, cause=cause)
            self.tensorboard.purge(step + 1)
            if dropped:
                self.console.note(f"going on from step {step}; {dropped} later steps are done again: {cause}")

    def close(self) -> None:
        """Flushes and closes the files, and leaves the terminal in order."""
        if self.main:
            self.console.close()
            self.tensorboard.close()
            self.run.close()

    def _draw(self, record: StepRecord, counts: np.ndarray) -> None:
        from launch.plots import load_image

        self.tensorboard.image(record.step, "balance/load_heat_map", load_image(counts, self._layer_names))
        if record.expert_bias is not None:
            bias = balance_stats.as_array(record.expert_bias)
            self.tensorboard.histogram(record.step, "balance/expert_bias", bias)


def scalar_tags(figures: Mapping[str, Any], layer_names: list[str]) -> dict[str, float]:
    """One step's object as TensorBoard tags: the last part of each is the key of metrics.jsonl, before it a heading."""
    tags = {}
    for key, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "ep_size"):
            tags[f"{GROUP_OF_KEY.get(key, 'extra')}/{key}"] = float(value)
    for name, value in zip(layer_names, figures["max_vio_per_layer"], strict=True):
        tags[f"balance_by_layer/max_vio/{name.replace(' ', '_')}"] = value
    return tags


def event_line(event: Mapping[str, Any]) -> str:
    """An event as one line for people: ``save at step 100: every 100 steps (seconds_taken 0.4)``."""
    known = ("time", "seconds", "kind", "cause", "step")
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known and value is not None)
    at = f" at step {event['step']}" if "step" in event else ""
    return f"{event['kind']}{at}: {event['cause']}{f' ({rest})' if rest else ''}"


def config_markdown(config: Mapping[str, Any]) -> str:
    """The configuration as a Markdown table of dotted keys."""
    rows = [f"| `{key}` | {value} |" for key, value in dotted(config).items()]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys: ``{"model": {"hidden_size": 64}}`` is ``{"model.hidden_size": 64}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _rounded(value: Any) -> float:
    """Six significant digits: timings and ratios carry no more, and the lines stay short."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else number


def _shortest(bias: np.ndarray) -> list[list[float]]:
    """fp32 values as the shortest decimals that read back to the same fp32: 0.003, not 0.003000000026077032."""
    return [[float(text) for text in row] for row in bias.astype(np.float32).astype(str)]
