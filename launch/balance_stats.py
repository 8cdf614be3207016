"""How evenly the tokens of one step fall on the experts: pure functions of integer counts.

Counts are ``tokens_per_expert``: (n_layers, E) int64, one row per MoE layer, summed over the step's whole global batch;
a torch tensor (any device) or a numpy array. Results are numpy float64 or plain numbers. A layer without a single token
has no balance: its figures are NaN, and means are taken over the layers that have tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# E routed experts, G ep_size, T tokens of a global batch, K top-k


def as_array(values: Any) -> np.ndarray:
    """A torch tensor (moved to the host) or anything array-like as a numpy array of the same type."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values)


def _violation(loads: np.ndarray) -> np.ndarray:
    """(max - mean) / mean along the last axis; NaN where there is no load at all."""
    loads = loads.astype(np.float64)
    if loads.shape[-1] == 0:
        return np.full(loads.shape[:-1], math.nan)
    mean = loads.mean(axis=-1)
    return np.divide(loads.max(axis=-1) - mean, mean, out=np.full(mean.shape, math.nan), where=mean > 0)


def _mean(figures: np.ndarray) -> float:
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if known.size else math.nan


def _checked(counts: Any) -> np.ndarray:
    loads = as_array(counts)
    if loads.ndim != 2:
        raise ValueError(f"tokens_per_expert has the shape {loads.shape}; give (n_layers, n_experts)")
    return loads


def max_vio_per_layer(counts: Any) -> np.ndarray:
    """(max load - mean load) / mean load over the experts of each layer: (n_layers,).

    Source: Wang et al. 2024, arXiv 2408.15664, section 4.1 (MaxVio of a batch).
    """
    return _violation(_checked(counts))


def max_vio(counts: Any) -> float:
    """``max_vio_per_layer`` averaged over the layers; NaN when there is no layer or no token."""
    return _mean(max_vio_per_layer(counts))


def rank_loads(counts: Any, ep_size: int, placement: Any = None) -> np.ndarray:
    """Tokens that each expert-parallel rank receives: (n_layers, G) int64.

    Args:
        placement: (n_layers, E) int64: slot s holds expert ``placement[layer, s]``, and rank g has the slots g*E/G ..
            (g+1)*E/G - 1. None: slot e holds expert e.

    Raises: ValueError when the experts do not divide evenly over the ranks, or the placement has another shape.
    """
    loads = _checked(counts)
    n_layers, n_experts = loads.shape
    if ep_size < 1 or n_experts % ep_size:
        raise ValueError(f"{n_experts} experts cannot be split over ep_size = {ep_size}; use a divisor of {n_experts}")
    if placement is not None:
        table = as_array(placement)
        if table.shape != loads.shape:
            raise ValueError(f"the placement has the shape {table.shape}, tokens_per_expert {loads.shape}")
        loads = np.take_along_axis(loads, table, axis=1)  # by slot
    return loads.reshape(n_layers, ep_size, n_experts // ep_size).sum(axis=-1)  # (n_layers, G)


def max_vio_rank_per_layer(counts: Any, ep_size: int, placement: Any = None) -> np.ndarray:
    """``max_vio_per_layer`` over expert-parallel ranks instead of experts: (n_layers,); zeros for ep_size 1."""
    return _violation(rank_loads(counts, ep_size, placement))


def max_vio_rank(counts: Any, ep_size: int, placement: Any = None) -> float:
    """``max_vio_rank_per_layer`` averaged over the layers; NaN when there is no layer or no token."""
    return _mean(max_vio_rank_per_layer(counts, ep_size, placement))


def dead_experts(counts: Any) -> np.ndarray:
    """Which experts got no token in this step: (n_layers, E) bool."""
    return _checked(counts) == 0


def load_ratio(counts: Any) -> np.ndarray:
    """Each expert's load over its layer's mean load: (n_layers, E) float64; 1 is a fair share, NaN without tokens."""
    loads = _checked(counts).astype(np.float64)
    mean = loads.mean(axis=-1, keepdims=True) if loads.shape[-1] else np.zeros((loads.shape[0], 1))
    return np.divide(loads, mean, out=np.full(loads.shape, math.nan), where=mean > 0)


def noise_floor(n_experts: int, routed_rows: float) -> float:
    """The max_vio that chance alone leaves when every choice is fair: sqrt(2 ln E * E / (T K)).

    The largest of E binomial loads with mean T K / E lies about sqrt(2 ln E) standard deviations above it. A max_vio at
    this height is as good as a balanced router gets on a batch of this size.

    Args:
        routed_rows: T * K, tokens of the global batch times experts per token (the sum of one layer's counts).
    """
    if n_experts < 1 or routed_rows <= 0:
        return math.nan
    return math.sqrt(2.0 * math.log(n_experts) * n_experts / routed_rows)


def max_vio_floor_per_layer(counts: Any) -> np.ndarray:
    """``noise_floor`` of each layer's own size and counts: (n_layers,)."""
    loads = _checked(counts)
    return np.array([noise_floor(loads.shape[1], float(rows)) for rows in loads.sum(axis=-1)], dtype=np.float64)


def max_vio_floor(counts: Any) -> float:
    """``max_vio_floor_per_layer`` averaged over the layers."""
    return _mean(max_vio_floor_per_layer(counts))


def mean_of_known(figures: Any) -> float:
    """The mean of the figures that are not NaN; NaN when there is none."""
    return _mean(as_array(figures).astype(np.float64))


def coactivation_lift(pairs: Any) -> np.ndarray:
    """How often a token chooses two experts together, over what their loads alone would give: (..., E, E) float64.

    Chance is pair_ij proportional to load_i * load_j for i != j, with as many pairs in all as were counted, so that 1
    is the weighted mean whatever the number of experts per token. The diagonal is NaN, as are experts without a token,
    and everything with one expert per token.

    Args:
        pairs: (..., E, E) int64: how often a token chose both; on the diagonal how often it chose the expert.
    """
    together = as_array(pairs).astype(np.float64)
    load = np.diagonal(together, axis1=-2, axis2=-1)  # (..., E)
    off_diagonal = ~np.eye(together.shape[-1], dtype=bool)
    chance = load[..., :, None] * load[..., None, :] * off_diagonal  # (..., E, E)
    total = (together * off_diagonal).sum(axis=(-2, -1), keepdims=True)
    known = (chance > 0) & (total > 0)
    expected = np.divide(
        chance * total, chance.sum(axis=(-2, -1), keepdims=True), out=np.zeros_like(chance), where=known
    )
    return np.divide(together, expected, out=np.full(together.shape, math.nan), where=expected > 0)


def layer_names(config: Mapping[str, Any], n_layers: int) -> list[str]:
    """Names for the rows of the counts: the model's own layer numbers, then the multi-token prediction blocks.

    Args:
        config: the resolved configuration as nested mappings; only its ``model`` section is read. When that section
            does not explain exactly ``n_layers`` rows, the names are plain ``moe 0``, ``moe 1``...
    """
    model = config.get("model")
    if isinstance(model, Mapping):
        dense, layers = model.get("first_k_dense_replace"), model.get("num_hidden_layers")
        if isinstance(dense, int) and isinstance(layers, int):
            names = [f"layer {i}" for i in range(dense, layers)]
            names += [f"mtp {k}" for k in range(int(model.get("num_nextn_predict_layers") or 0))]
            if len(names) == n_layers:
                return names
    return [f"moe {i}" for i in range(n_layers)]


def against_the_median(bias: np.ndarray) -> np.ndarray:
    """Biases (..., E) as differences from the median expert's: what all experts of a layer share changes no choice."""
    return np.asarray(bias - np.median(bias, axis=-1, keepdims=True))
