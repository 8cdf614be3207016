"""Which slot holds which expert, and how to deal experts out so that the busiest rank has less to do. Pure functions.

# M MoE layers, E routed experts, G ep_size, L = E/G experts a rank

A placement is a table (M, E) int64: slot s of layer row m holds expert `table[m, s]`, and the slots g*L .. g*L+L-1 are
those of rank g. Without one, slot e holds expert e. A layer's ranks wait for the busiest of them, therefore layers are
dealt out one by one. All sums and comparisons are of integers: ranks that see the same counts find the same table.
"""

from typing import Any

import numpy as np

_Loads = np.ndarray  # (E,) int64: what each expert of one layer was sent


def identity(n_layers: int, n_experts: int) -> np.ndarray:
    """The table of a model whose experts were never moved: (M, E) int64."""
    return np.tile(np.arange(n_experts, dtype=np.int64), (n_layers, 1))


def validate(table: Any, n_layers: int, n_experts: int) -> np.ndarray:
    """The table as (M, E) int64.

    Raises:
        ValueError: another shape, or a layer that does not hold every expert once.
    """
    checked = np.asarray(table, dtype=np.int64)
    if checked.shape != (n_layers, n_experts):
        raise ValueError(
            f"a placement of shape {checked.shape} does not fit {n_layers} MoE layers of {n_experts} experts"
        )
    wrong = np.flatnonzero((np.sort(checked, axis=1) != np.arange(n_experts)).any(axis=1))
    if wrong.size:
        raise ValueError(f"the placement of layer row {wrong[0]} does not hold every expert once: {checked[wrong[0]]}")
    return checked


def rank_loads(counts: Any, table: np.ndarray, ep_size: int) -> np.ndarray:
    """Tokens that each rank's experts receive.

    Args:
        counts: (M, E) int64 tokens per expert, by the expert's own number.
        table: (M, E) int64.
        ep_size: G, a divisor of E.

    Returns:
        (M, G) int64.
    """
    by_slot = np.take_along_axis(np.asarray(counts), table, axis=1)
    return by_slot.reshape(len(table), ep_size, table.shape[1] // ep_size).sum(axis=-1)


def moved(before: np.ndarray, after: np.ndarray, ep_size: int) -> np.ndarray:
    """Which experts live on another rank than before: (M, E) bool, by the expert's own number."""
    n_local = before.shape[1] // ep_size
    return np.argsort(before, axis=1) // n_local != np.argsort(after, axis=1) // n_local


def balanced(counts: Any, ep_size: int, current: np.ndarray, min_gain: float = 0.0) -> np.ndarray:
    """A table under which the busiest rank of each layer has less to do; never one under which it has more.

    Two tables are tried for a layer, in order of how many experts they move, and each must earn `min_gain` over the one
    before it: the current one improved by swaps; and one dealt out from nothing, heaviest expert first to the least
    loaded rank with a free slot (Graham 1969, "Bounds on multiprocessing timing anomalies", with a limit on the number
    of jobs), improved by swaps, its ranks then named so that most experts stay. An expert that stays on its rank stays
    in its slot.

    Args:
        counts: (M, E) int64 tokens per expert, by the expert's own number.
        ep_size: G, a divisor of E.
        current: (M, E) int64, the table that the counts were measured under or any other.
        min_gain: the part of the ranks' mean load that the busiest one must lose to make a move worth while; with 0
            anything that it loses.

    Returns:
        (M, E) int64.
    """
    loads = np.asarray(counts, dtype=np.int64)
    validate(current, *loads.shape)
    rows = [_layer(of_layer, ep_size, row, min_gain) for of_layer, row in zip(loads, current, strict=True)]
    return np.stack(rows) if rows else current.copy()


def _layer(loads: _Loads, ep_size: int, row: np.ndarray, min_gain: float) -> np.ndarray:
    """`balanced` for one layer: (E,)."""
    held = row.reshape(ep_size, -1)  # (G, L)
    best, busiest = row, int(loads[held].sum(1).max())
    for found in (_swapped(loads, held), _named_as(held, _swapped(loads, _dealt(loads, held)))):
        gain = busiest - int(loads[found].sum(1).max())
        if gain > 0 and gain * ep_size >= min_gain * int(loads.sum()):
            best, busiest = _in_slots(held, found), busiest - gain
    return best


def _dealt(loads: _Loads, held: np.ndarray) -> np.ndarray:
    """Experts from the heaviest to the lightest, each to the least loaded rank with a free slot: (G, L).

    Of ranks with equal loads the expert's own comes first, then the lower number.
    """
    ep_size, n_local = held.shape
    home = np.argsort(held.ravel()) // n_local
    dealt: list[list[int]] = [[] for _ in range(ep_size)]
    sums = [0] * ep_size
    for expert in np.argsort(-loads, kind="stable").tolist():
        free = (rank for rank in range(ep_size) if len(dealt[rank]) < n_local)
        rank = min(free, key=lambda rank: (sums[rank], rank != home[expert], rank))
        dealt[rank].append(expert)
        sums[rank] += int(loads[expert])
    return np.array(dealt, dtype=np.int64)


def _swapped(loads: _Loads, held: np.ndarray) -> np.ndarray:
    """Swaps an expert of the busiest rank for one of another rank as long as that lowers the higher of their loads.

    Each swap is the best of all such; the sum of squared loads falls with every one, so that this ends.
    """
    held = held.copy()
    n_local = held.shape[1]
    sums = loads[held].sum(1)  # (G,)
    while True:
        top = int(sums.argmax())
        gain = loads[held[top]][:, None] - loads[held.ravel()][None, :]  # (L, E): what the busiest rank would lose
        others = np.repeat(sums, n_local)[None, :] + gain  # what the other would then have
        higher = np.maximum(sums[top] - gain, others)
        higher[:, top * n_local : (top + 1) * n_local] = sums[top]
        mine, other = divmod(int(higher.argmin()), held.size)
        if higher[mine, other] >= sums[top]:
            return held
        rank, place = divmod(other, n_local)
        sums[top] -= gain[mine, other]
        sums[rank] += gain[mine, other]
        held[top, mine], held[rank, place] = held[rank, place], held[top, mine]


def _named_as(held: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Reorders the rows of `found`, each a rank's experts, so that many stay on the rank they are on.

    Which rank carries which row changes no load.
    """
    ep_size, n_local = held.shape
    home = np.argsort(held.ravel()) // n_local  # (E,)
    shared = np.stack([np.bincount(home[row], minlength=ep_size) for row in found])  # (G, G): row of found, rank
    named = np.empty_like(found)
    for _ in range(ep_size):
        row, rank = divmod(int(shared.argmax()), ep_size)
        named[rank] = found[row]
        shared[row, :] = shared[:, rank] = -1
    return named


def _in_slots(held: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Writes each rank's experts into its slots, those that it had before into their old ones: (G, L) -> (E,)."""
    slots = held.copy()
    for before, after in zip(slots, found, strict=True):
        leaving = ~np.isin(before, after)
        before[leaving] = np.sort(after[~np.isin(after, before)])
    return slots.ravel()
