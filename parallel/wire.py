"""What travels, to the byte: the layout of a record, and how many bytes each rank sends in one layer. Pure functions.

    kind        a record goes out for            and comes back as
    all_to_all  each choice                      the expert's weighted row
    dedup       each (token, rank) pair          that rank's weighted sum
    two_hop     each (token, node) pair to the sender's counterpart in the node, then from there
                each (token, rank) pair          the sums, added up in the node on the way

A record that goes out is the token's row, its fp8 scale where it has one, and for each of its slots the expert's
number (int32) and the weight (fp32). The gradient of a result goes out like the token, without slots; the gradient of a
token comes back like a result, with the gradient of each slot's weight.
"""

# T tokens, D hidden, K top-k, G ep_size

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_to_all", "dedup", "two_hop"]
PayloadName = Literal["auto", "fp32", "bf16", "fp8"]

HEADER_NUMBERS = 8  # of a message of counts, see parallel/counts.py
_NUMBER_BYTES = 8
_SLOT_BYTES = 8  # int32 number of the expert, fp32 weight
_WEIGHT_BYTES = 4
_SCALE_BYTES = 4
_WORD = 4


def record_bytes(hidden: int, itemsize: int, trailer_bytes: int = 0, scaled: bool = False) -> int:
    """Bytes of one record: the row, filled up to a whole 4-byte word where anything follows it, and what follows."""
    trailer = trailer_bytes + (_SCALE_BYTES if scaled else 0)
    row = hidden * itemsize
    return row if not trailer else -(-row // _WORD) * _WORD + trailer


@dataclass(frozen=True)
class LayerBytes:
    """What one rank sends to others in one layer: counts, forward (tokens, then results), backward (gradients)."""

    counts: int
    forward: int
    backward: int


def layer_bytes(
    kind: Kind,
    choices: Sequence[Sequence[Sequence[int]]],
    n_experts: int,
    hidden: int,
    itemsize: int,
    *,
    ranks_per_node: int = 0,
    payload: PayloadName = "auto",
    chunks: int = 1,
) -> list[LayerBytes]:
    """Bytes that each rank sends to other ranks for one forward and one backward of a layer.

    Args:
        choices: choices[rank][token] are the K experts of a token of a rank.
        n_experts: E in all, spread evenly over len(choices) ranks.
        hidden: D.
        itemsize: bytes of a number in the compute dtype, which `auto` takes for the payload.
        ranks_per_node: of two_hop.
        chunks: pieces that a layer's tokens are sent in; only the counts know of them.
    """
    size = len(choices)
    local = n_experts // size
    top_k = max((len(token) for tokens in choices for token in tokens), default=0)
    slots = 1 if kind == "all_to_all" else top_k
    out_item = {"auto": itemsize, "fp32": 4, "bf16": 2, "fp8": 1}[payload]
    back_item = 2 if payload == "fp8" else out_item
    out = record_bytes(hidden, out_item, slots * _SLOT_BYTES, scaled=payload == "fp8")
    back = record_bytes(hidden, back_item)
    gradient_back = record_bytes(hidden, back_item, slots * _WEIGHT_BYTES)
    message = _NUMBER_BYTES * (HEADER_NUMBERS + chunks * (2 + local))
    if kind == "two_hop" and ranks_per_node < size:
        first, second = _two_hops(choices, local, ranks_per_node)
        sent = [first[rank][0] + second[rank][0] for rank in range(size)]
        received = [first[rank][1] + second[rank][1] for rank in range(size)]
        nodes = size // ranks_per_node
        outer = _NUMBER_BYTES * (HEADER_NUMBERS + chunks * (1 + ranks_per_node * (1 + local)))
        counts = (nodes - 1) * outer + (ranks_per_node - 1) * message
    else:
        matrix = rows_between(choices, local, size, each_choice=kind == "all_to_all")
        sent = [sum(matrix[rank]) - matrix[rank][rank] for rank in range(size)]
        received = [sum(row[rank] for row in matrix) - matrix[rank][rank] for rank in range(size)]
        counts = (size - 1) * message
    return [
        LayerBytes(counts, sent[r] * out + received[r] * back, sent[r] * back + received[r] * gradient_back)
        for r in range(size)
    ]


def rows_between(
    choices: Sequence[Sequence[Sequence[int]]], local: int, size: int, each_choice: bool = False
) -> list[list[int]]:
    """(G, G) records from each rank to each: one for a (token, rank) pair, or one for each choice."""
    matrix = [[0] * size for _ in choices]
    for source, tokens in enumerate(choices):
        for token in tokens:
            goals = [expert // local for expert in token]
            for goal in goals if each_choice else set(goals):
                matrix[source][goal] += 1
    return matrix


def _two_hops(
    choices: Sequence[Sequence[Sequence[int]]], local: int, per_node: int
) -> tuple[list[list[int]], list[list[int]]]:
    """For each rank, of each hop: records sent to others, received from others."""
    first, second = ([[0, 0] for _ in choices] for _ in range(2))
    for source, tokens in enumerate(choices):
        node, seat = divmod(source, per_node)
        for token in tokens:
            goals = {expert // local for expert in token}
            for goal_node in {goal // per_node for goal in goals}:
                if goal_node != node:
                    first[source][0] += 1
                    first[goal_node * per_node + seat][1] += 1
            for goal in goals:
                counterpart = goal // per_node * per_node + seat
                if goal != counterpart:
                    second[counterpart][0] += 1
                    second[goal][1] += 1
    return first, second
