"""Logical names: how a rank's parameter splits into tensors that are the same in every layout."""

# L local experts

from __future__ import annotations

import math
from typing import NamedTuple

_STACKED = (".experts.gate_up_proj", ".experts.down_proj")


class Piece(NamedTuple):
    """A run of a flattened local parameter that is one logical tensor."""

    logical_name: str  # e.g. layers.3.mlp.experts.17.gate_up_proj, 17 being the expert's number over all ranks
    start: int  # first element in the flattened local parameter
    numel: int
    shape: tuple[int, ...]


def is_expert(name: str) -> bool:
    """Whether a parameter is stacked routed experts: the only ones that differ between ranks of an ep group."""
    return name.endswith(_STACKED)


def pieces(name: str, local_shape: tuple[int, ...], ep_rank: int) -> list[Piece]:
    """Split a local parameter into its logical tensors, in storage order.

    Args:
        name: the parameter's name in the module tree.
        local_shape: its shape on this rank; (L, ...) for stacked experts.
        ep_rank: this rank's place in its expert-parallel group. `ep_rank 1, L 4 -> experts 4 5 6 7`

    Returns:
        One piece, or L for stacked experts.
    """
    shape = tuple(local_shape)
    if not is_expert(name):
        return [Piece(name, 0, math.prod(shape), shape)]
    stem, _, leaf = name.rpartition(".")
    n_local, each = shape[0], shape[1:]
    numel = math.prod(each)
    return [Piece(f"{stem}.{ep_rank * n_local + i}.{leaf}", i * numel, numel, each) for i in range(n_local)]
