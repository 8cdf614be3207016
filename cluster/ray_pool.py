"""Where a Ray cluster can place ranks: which nodes count, which are avoided, and how many ranks they hold."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.context import RankFailure
from cluster.ray_actors import Connection
from cluster.ray_capacity import bundles_of, make_group, places, wants_gpu
from cluster.ray_nodes import Node, draining_nodes, living_nodes
from cluster.staging import ROOMS

FAILURES = 2  # after so many a node is avoided


class RayPool:
    """The `cluster.supervisor.Pool` of one run, and its connection, which lasts from generation to generation.

    Args:
        spec: the size that was asked for.
        legal: the largest number of workers, at most this, that the configuration can run on; None: there is none.
        code, folders, insecure: see `ray_actors.run`.
    """

    def __init__(
        self,
        spec: ClusterConfig,
        legal: Callable[[int], int | None],
        code: Path | None = None,
        folders: Sequence[str] = ROOMS,
        insecure: bool = False,
    ) -> None:
        self.spec, self.legal = spec, legal
        self.connection = Connection(code, folders, insecure)
        self.in_use: set[str] = set()  # ids of the nodes of the present generation
        self._suspects: set[str] = set()  # nodes that lost a rank: they may be gone
        self._failures: Counter[str] = Counter()
        self._addresses: dict[str, str] = {}  # by id, of every node that was ever seen
        self._ordered = 0
        self._order: Any = None  # the placement group that stands for what is ordered

    def available(self) -> int:
        """How many workers the nodes hold that are alive, not about to go, and not avoided."""
        return self._count(self._usable())

    def blame(self, failure: RankFailure) -> None:
        """Counts a failure of the node of that rank."""
        if failure.node:
            self._suspects.add(failure.node)
            self._failures[self._key(failure.node)] += 1

    def leaving(self) -> str:
        """A drain notice for a node of this run."""
        return "a node of this run is about to be drained" if self.in_use & draining_nodes() else ""

    def order(self, workers: int) -> None:
        """Asks for room for so many workers with a placement group, for which an autoscaler starts nodes."""
        if workers == self._ordered:
            return
        from ray.util import remove_placement_group

        if self._order is not None:
            remove_placement_group(self._order)
        self._order, self._ordered = None, workers
        if workers:
            on_gpus = wants_gpu(self.spec, [node.resources for node in self._living()])
            self._order = make_group(*bundles_of(self.spec, workers, on_gpus), self.avoided())

    def avoided(self) -> list[str]:
        """Ids of living nodes that failed too often, unless the rest could not go on without them."""
        living = self._living()
        bad = {node.id for node in living if self._failures[self._key(node.id, living)] >= FAILURES}
        rest = self.legal(min(self.spec.workers, self._count([node for node in living if node.id not in bad])))
        return sorted(bad) if (rest or 0) >= self.spec.min_workers else []

    def shape(self, workers: int) -> ClusterConfig:
        """The cluster section for another number of workers: as many on each node as were asked for."""
        per_node = self.spec.workers // self.spec.nodes
        nodes = workers // per_node if self.spec.nodes > 1 and workers % per_node == 0 else 1
        return replace(self.spec, workers=workers, nodes=nodes)

    def _usable(self) -> list[Node]:
        avoided = set(self.avoided())
        return [node for node in self._living() if node.id not in avoided]

    def _living(self) -> list[Node]:
        going = draining_nodes()
        living = [node for node in living_nodes() if node.id not in going]
        return [node for node in living if node.id not in self._suspects or node.answers()]

    def _count(self, nodes: list[Node]) -> int:
        on_gpus = wants_gpu(self.spec, [node.resources for node in nodes])
        each = [places(node.resources, self.spec, on_gpus) for node in nodes]
        if self.spec.nodes == 1:
            return sum(each)
        per_node = self.spec.workers // self.spec.nodes
        return per_node * min(self.spec.nodes, sum(count >= per_node for count in each))

    def _key(self, node_id: str, nodes: list[Node] | None = None) -> str:
        """What a node is known by: its address, since Ray gives it a new id each time, unless several share one."""
        nodes = living_nodes() if nodes is None else nodes
        self._addresses |= {node.id: node.address for node in nodes}
        address = self._addresses.get(node_id, "")
        shared = any(node.address == address for node in nodes if node.id != node_id)
        return node_id if shared or not address else address
