"""What is known of a Ray cluster's nodes: alive, about to be drained, gone though Ray does not know it yet."""

import socket
from dataclasses import dataclass

PROBE_S = 1.0


@dataclass(frozen=True)
class Node:
    """A node that Ray takes for living. resources: in total, {"CPU": 4.0, ...}. port: of its raylet."""

    id: str
    address: str
    port: int
    resources: dict[str, float]

    def answers(self) -> bool:
        """Whether its raylet takes connections. Ray itself notices a dead node after half a minute by default."""
        try:
            socket.create_connection((self.address, self.port), PROBE_S).close()
        except OSError:
            return False
        return True


def living_nodes() -> list[Node]:
    """All nodes that Ray takes for living."""
    import ray

    return [
        Node(entry["NodeID"], entry["NodeManagerAddress"], int(entry["NodeManagerPort"]), dict(entry["Resources"]))
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def is_gone(node_id: str) -> bool:
    """Whether a node is dead: Ray says so, or its raylet no longer answers."""
    found = [node for node in living_nodes() if node.id == node_id]
    return not found or not found[0].answers()


def draining_nodes() -> set[str]:
    """Ids of the nodes that have been told that they will go; Ray has no public call for it."""
    from ray._private.state import state

    return set(state.get_draining_nodes())
