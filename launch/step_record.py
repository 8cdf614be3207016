"""What one optimizer step measured, and the object for metrics.jsonl that is derived from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from launch import balance_stats
from launch.runfolder import utc_now

if TYPE_CHECKING:
    import torch

CONTRACT_KEYS = (
    "step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu", "memory_gib",
    "data_wait_seconds", "all_to_all_seconds", "max_vio", "max_vio_rank", "dead_experts", "bias_abs_max", "world_size",
)  # fmt: skip


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
    bias_rate: what the rule's rate was in this step, after schedule and alarms; None for rules without a bias.
    gate_entropy: (n_layers,) mean entropy a token of the scores normalised over the experts, in nats, at most ln E.
    coactivation: (n_layers, E, E) int64, how often a token chose both experts (diagonal: tokens of the expert); None in
        steps that did not count it.
    bytes_sent: payload of this step's all-to-alls to other ranks, over all ranks.
    waiting_seconds: mean over ranks of the exposed time in all-to-all beyond that of the rank that waited least.
    placement: (n_layers, E) int64, which expert lies in each slot, slots in the order of the ranks; None is in order.
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
    bias_rate: float | None = None
    gate_entropy: "torch.Tensor | np.ndarray | None" = None
    coactivation: "torch.Tensor | np.ndarray | None" = None
    bytes_sent: int | None = None
    waiting_seconds: float | None = None
    placement: "torch.Tensor | np.ndarray | None" = None
    epoch: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def derive(record: StepRecord, with_loads: bool = True) -> dict[str, Any]:
    """The step's object for metrics.jsonl: the contract's keys, and what else the report draws from.

    Figures that do not exist for this model are None (max_vio of a dense one); those that went wrong stay NaN or inf.

    Raises: ValueError for counts of a wrong shape, or an ``extra`` that would overwrite a figure.
    """
    counts = balance_stats.as_array(record.tokens_per_expert)
    dense = counts.size == 0
    rows = counts.sum(axis=-1)  # (n_layers,)
    bias, changed, entropy, placement = (
        None if values is None else balance_stats.as_array(values)
        for values in (record.expert_bias, record.changed_by_bias, record.gate_entropy, record.placement)
    )
    max_vio_rank = math.nan if dense else balance_stats.max_vio_rank(counts, record.ep_size, placement)
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
        "max_vio_rank": None if dense else _rounded(max_vio_rank),
        "max_vio_floor": None if dense else _rounded(balance_stats.max_vio_floor(counts)),
        "max_vio_per_layer": np.round(balance_stats.max_vio_per_layer(counts), 6).tolist(),
        "dead_experts": int(balance_stats.dead_experts(counts).sum()),
        "dead_experts_per_layer": balance_stats.dead_experts(counts).sum(axis=-1).tolist(),
        "bias_abs_max": 0.0 if bias is None or bias.size == 0 else float(np.abs(bias).max()),
        "bias_rate": _float(record.bias_rate),
        "changed_by_bias_share": float(changed.sum() / rows.sum()) if changed is not None and rows.sum() else None,
        "gate_entropy": None if entropy is None or dense else _rounded(balance_stats.mean_of_known(entropy)),
        "bytes_sent": None if record.bytes_sent is None else int(record.bytes_sent),
        "waiting_seconds": None if record.waiting_seconds is None else _rounded(record.waiting_seconds),
    }
    if changed is not None and not dense:
        share = np.divide(changed, rows, out=np.full(len(rows), math.nan), where=rows > 0)
        figures["changed_by_bias_share_per_layer"] = np.round(share, 6).tolist()
    if entropy is not None and not dense:
        figures["gate_entropy_per_layer"] = np.round(entropy.astype(np.float64), 6).tolist()
    if with_loads and not dense:
        figures["tokens_per_expert"] = counts.tolist()
        figures["expert_bias"] = None if bias is None else _shortest(bias)
        if placement is not None:
            figures["placement"] = placement.tolist()
    taken = sorted(figures.keys() & record.extra.keys())
    if taken:
        raise ValueError(f"StepRecord.extra would overwrite {', '.join(taken)}; give these figures other names")
    return {**figures, **record.extra}


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _rounded(value: Any) -> float:
    """Six significant digits: timings and ratios carry no more, and the lines stay short."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else number


def _shortest(bias: np.ndarray) -> list[list[float]]:
    """fp32 values as the shortest decimals that read back to the same fp32: 0.003, not 0.003000000026077032."""
    return [[float(text) for text in row] for row in bias.astype(np.float32).astype(str)]
