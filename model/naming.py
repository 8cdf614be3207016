"""Logical names: how a rank's parameter splits into tensors that are the same in every layout."""

# L local experts

from __future__ import annotations

import math
from collections.abc import Sequence
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


def pieces(name: str, local_shape: tuple[int, ...], experts: Sequence[int] = ()) -> list[Piece]:
    """Split a local parameter into its logical tensors, in storage order.

    Args:
        name: the parameter's name in the module tree.
        local_shape: its shape on this rank; (L, ...) for stacked experts.
        experts: the numbers of the L experts that are stacked in it, in storage order (`model.slots.local_experts`);
            parameters that are not stacked experts need none.

    Returns:
        One piece, or L for stacked experts.

    Raises:
        ValueError: not as many numbers as stacked experts.
    """
    shape = tuple(local_shape)
    if not is_expert(name):
        return [Piece(name, 0, math.prod(shape), shape)]
    stem, _, leaf = name.rpartition(".")
    each = shape[1:]
    numel = math.prod(each)
    if len(experts) != shape[0]:
        raise ValueError(f"{name} stacks {shape[0]} experts, but the numbers of {len(experts)} were given: {experts}")
    return [Piece(f"{stem}.{expert}.{leaf}", i * numel, numel, each) for i, expert in enumerate(experts)]
