"""Legal world sizes and the order of ranks over nodes: arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Worlds:
    """Legal sizes in ascending order, and for each other size up to the limit every rule that it breaks."""

    legal: tuple[int, ...]
    illegal: dict[int, tuple[str, ...]]

    def largest(self, limit: int) -> int | None:
        """The largest legal size that is at most limit, None when there is none."""
        return max((size for size in self.legal if size <= limit), default=None)


def world_problems(
    world_size: int,
    *,
    n_routed_experts: int,
    ep_size: int,
    lanes: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> list[str]:
    """Every rule that this number of ranks breaks.

    All ranks are data-parallel ranks; expert groups are consecutive ranks. A global batch is dealt to the lanes and
    the lanes to the ranks, so both counts have to divide.
    """
    found = []
    if world_size < 1:
        return [f"world size {world_size} must be at least 1"]
    if n_routed_experts % ep_size:
        found.append(
            f"model.n_routed_experts = {n_routed_experts} cannot be split over parallel.ep_size = {ep_size}; "
            f"use an ep_size among {divisors(n_routed_experts)}"
        )
    if world_size % ep_size:
        found.append(f"world size {world_size} is not a multiple of parallel.ep_size = {ep_size}")
    if lanes % world_size:
        found.append(f"data.lanes = {lanes} cannot be dealt to {world_size} ranks; lanes has to be a multiple of them")
    per_step = world_size * micro_batch_size
    if global_batch_size % per_step:
        found.append(
            f"train.global_batch_size = {global_batch_size} is not a multiple of {world_size} ranks x "
            f"train.micro_batch_size = {micro_batch_size} ({per_step})"
        )
    return found


def legal_worlds(
    limit: int,
    *,
    n_routed_experts: int,
    ep_size: int,
    lanes: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> Worlds:
    """Which numbers of ranks from 1 to limit can run this configuration, and why the others cannot."""
    legal, illegal = [], {}
    for size in range(1, limit + 1):
        found = world_problems(
            size,
            n_routed_experts=n_routed_experts,
            ep_size=ep_size,
            lanes=lanes,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        )
        if found:
            illegal[size] = tuple(found)
        else:
            legal.append(size)
    return Worlds(tuple(legal), illegal)


def divisors(number: int) -> list[int]:
    """All positive divisors in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: which placed worker it is, and its place on its node."""

    worker: int
    node_rank: int
    local_rank: int
    local_world_size: int


def seat_ranks(node_ids: Sequence[str], group_size: int = 1) -> list[Seat]:
    """Gives ranks to placed workers so that groups of consecutive ranks stay inside a node wherever they fit.

    Each node first fills as many whole groups as it can; the workers left over come last, those of a node together
    and larger remainders first, so that as few groups as possible cross a link between nodes.

    Args:
        node_ids: the node of each placed worker, in the order of placement.
        group_size: ranks in an expert group; world 6 on nodes A A A B B B with groups of 2 gives A0 A1 | B3 B4 | A2 B5.

    Returns:
        The seats by rank. Node ranks follow the order in which nodes receive their first rank.
    """
    by_node: dict[str, list[int]] = {}
    for worker, node in enumerate(node_ids):
        by_node.setdefault(node, []).append(worker)
    order: list[int] = []
    rest: list[list[int]] = []
    for workers in by_node.values():
        whole = len(workers) // group_size * group_size
        order += workers[:whole]
        rest.append(workers[whole:])
    for workers in sorted(rest, key=len, reverse=True):
        order += workers
    node_rank: dict[str, int] = {}
    seen: dict[str, int] = {}
    seats = []
    for worker in order:
        node = node_ids[worker]
        node_rank.setdefault(node, len(node_rank))
        local_rank = seen.get(node, 0)
        seen[node] = local_rank + 1
        seats.append(Seat(worker, node_rank[node], local_rank, len(by_node[node])))
    return seats


def groups_across_nodes(seats: Sequence[Seat], group_size: int) -> int:
    """How many groups of consecutive ranks have members on more than one node."""
    starts = range(0, len(seats), group_size)
    return sum(len({seat.node_rank for seat in seats[start : start + group_size]}) > 1 for start in starts)
