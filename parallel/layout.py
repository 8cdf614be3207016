"""Which rank holds which experts: integer arithmetic, no process group.

Expert-parallel groups are runs of consecutive ranks, so that they stay inside a node when they fit:

    world 8, ep 4:  ep_groups  [0 1 2 3] [4 5 6 7]          each holds every expert once
                    edp_groups [0 4] [1 5] [2 6] [3 7]      each holds the same experts
    ... on nodes of 2:  inside_groups [0 1] [2 3] [4 5] [6 7]   one ep_group's ranks of one node
                        node_groups   [0 2] [1 3] [4 6] [5 7]   its ranks with one place in each node
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The place of one rank among `world_size`, `ep_size` of which share the experts.

    ranks_per_node: neighbouring ranks that share a node, 0 where all do.

    Raises:
        ValueError: when ep_size does not divide world_size, the rank is not one of the world's, or nodes cut an
            expert-parallel group into unequal parts.
    """

    world_size: int
    ep_size: int
    rank: int
    ranks_per_node: int = 0

    def __post_init__(self) -> None:
        if self.ep_size < 1 or self.world_size < 1 or self.world_size % self.ep_size:
            raise ValueError(
                f"{self.world_size} ranks cannot be cut into expert-parallel groups of {self.ep_size}; "
                f"use an ep_size among {divisors(self.world_size)}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of the {self.world_size} ranks 0 to {self.world_size - 1}")
        per_node = self.ranks_per_node
        if per_node < 0 or (per_node and self.ep_size % per_node and per_node % self.ep_size):
            raise ValueError(
                f"nodes of {per_node} ranks cut expert-parallel groups of {self.ep_size} into unequal parts; "
                f"use an ep_size that divides {per_node} or is a multiple of it"
            )

    @property
    def ep_rank(self) -> int:
        """Place inside the expert-parallel group: the experts ep_rank * L .. ep_rank * L + L - 1 live here."""
        return self.rank % self.ep_size

    @property
    def edp_rank(self) -> int:
        """Place among the ranks that hold the same experts."""
        return self.rank // self.ep_size

    @property
    def edp_size(self) -> int:
        """How many ranks hold the same experts."""
        return self.world_size // self.ep_size

    def ep_groups(self) -> list[list[int]]:
        """Every expert-parallel group of the world, as lists of ranks."""
        return [list(range(start, start + self.ep_size)) for start in range(0, self.world_size, self.ep_size)]

    def edp_groups(self) -> list[list[int]]:
        """Every expert-data-parallel group of the world, as lists of ranks."""
        return [list(range(first, self.world_size, self.ep_size)) for first in range(self.ep_size)]

    @property
    def spans_nodes(self) -> bool:
        """Whether an expert-parallel group lies on several nodes."""
        return 0 < self.ranks_per_node < self.ep_size

    def inside_groups(self) -> list[list[int]]:
        """The ranks of each node, where expert-parallel groups span nodes; otherwise empty."""
        size = self.ranks_per_node
        if not self.spans_nodes:
            return []
        return [list(range(start, start + size)) for start in range(0, self.world_size, size)]

    def node_groups(self) -> list[list[int]]:
        """Of each expert-parallel group the ranks with the same place in each node; empty where it is in one node."""
        if not self.spans_nodes:
            return []
        size = self.ranks_per_node
        return [group[seat::size] for group in self.ep_groups() for seat in range(size)]


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def slice_bounds(numel: int, parts: int, part: int) -> tuple[int, int]:
    """Cuts `numel` elements into `parts` nearly equal runs and returns [start, stop) of run `part`."""
    return numel * part // parts, numel * (part + 1) // parts
