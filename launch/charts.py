"""Which figure stands in which chart of TensorBoard: the scalars' tags, and the Custom Scalars tab."""

from collections.abc import Mapping, Sequence
from typing import Any

GROUP_OF_KEY = {  # the headings under which TensorBoard shows the figures
    "loss": "train", "mtp_loss": "train", "sequence_balance": "train", "grad_norm": "train", "lr": "train",
    "step_seconds": "speed", "tokens_per_second": "speed", "mfu": "speed", "data_wait_seconds": "speed",
    "all_to_all_seconds": "speed", "exposed_all_to_all_seconds": "speed", "waiting_seconds": "speed",
    "bytes_sent": "speed", "memory_gib": "memory", "slowest_rank": "speed", "slowest_rank_ratio": "speed",
    "save_seconds": "speed", "evaluation_seconds": "speed",
    "heldout_loss": "evaluation", "heldout_bits_per_byte": "evaluation",
    "max_vio": "balance", "max_vio_rank": "balance", "max_vio_floor": "balance", "dead_experts": "balance",
    "bias_abs_max": "balance", "bias_rate": "balance", "changed_by_bias_share": "balance", "gate_entropy": "balance",
    "tokens": "progress", "epoch": "progress", "world_size": "progress",
}  # fmt: skip
PER_LAYER = ("max_vio", "gate_entropy", "changed_by_bias_share", "dead_experts")  # also written as KEY_per_layer
NOT_DRAWN = ("step", "ep_size", "seconds")


def scalar_tags(figures: Mapping[str, Any], layer_names: Sequence[str]) -> dict[str, float]:
    """One step's object as TensorBoard tags: the last part of each is the key of metrics.jsonl, before it a heading."""
    tags = {}
    for key, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in NOT_DRAWN:
            tags[f"{GROUP_OF_KEY.get(key, 'extra')}/{key}"] = float(value)
    for key in PER_LAYER:
        for name, value in zip(layer_names, figures.get(f"{key}_per_layer") or [None] * len(layer_names), strict=True):
            if value is not None:
                tags[f"balance_by_layer/{key}/{tag_part(name)}"] = float(value)
    return tags


def chart_layout() -> dict[str, dict[str, list[str]]]:
    """The charts of TensorBoard's Custom Scalars tab: heading -> chart -> regular expressions of its tags."""
    by_layer = "balance_by_layer/{}/.*"
    return {
        "Loss": {
            "loss and held-out loss (nats per token)": [r"train/(loss|mtp_loss)$", r"evaluation/heldout_loss$"],
            "gradient norm": [r"train/grad_norm$"],
            "learning rate": [r"train/lr$"],
        },
        "Balance": {
            "max_vio: experts, ranks, noise floor": [r"balance/max_vio(_rank|_floor)?$"],
            "max_vio by layer": [by_layer.format("max_vio"), "balance/max_vio_floor$"],
            "gate entropy by layer (nats)": [by_layer.format("gate_entropy")],
            "share of choices that the bias changed, by layer": [by_layer.format("changed_by_bias_share")],
            "experts without a token, by layer": [by_layer.format("dead_experts")],
        },
        "Time": {
            "all-to-all and waiting (seconds a step)": [
                "speed/(all_to_all|exposed_all_to_all|waiting|data_wait)_seconds$"
            ],
            "slowest rank: own time over the middle rank's": ["speed/slowest_rank_ratio$"],
            "goodput: productive share of all time": ["time/goodput$"],
            "where the time went (seconds so far)": [
                "time/(productive|lost|saving|starting|stopping|evaluation)_seconds$"
            ],
        },
    }


def tag_part(layer_name: str) -> str:
    """A layer's name as part of a tag."""
    return layer_name.replace(" ", "_")
