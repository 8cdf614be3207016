"""Tells a Ray cluster that this machine's node is about to go, and waits until no rank runs on it any more.

    python -m cluster.drain [--address HEAD:6379] [--seconds 120]

For whatever hears of it first: a pod's preStop hook, a spot machine's notice, the SIGTERM of an init system. The run's
driver sees the notice, its ranks save at the next step and leave, and it goes on elsewhere (cause `preemption`). Needs
the cluster's token, as any client of it. Exit status: 0 the ranks are gone, 1 they are not, or nobody could be told.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.ports import interface_of

DRAIN_NODE_REASON_PREEMPTION = 2  # ray.core.generated.autoscaler_pb2; a node with work refuses any other reason
RANK_TITLE = b"ray::RankActor"  # Ray names its processes after what they run
REACH_S = 5.0


class DrainError(RuntimeError):
    """The notice could not be given; the text says why."""


def nodes_here(address: str) -> list[str]:
    """Ids of the living nodes of the cluster at `address` whose network address is one of this machine's."""
    from ray._raylet import GcsClient

    found = GcsClient(address=address).get_all_node_info(timeout=REACH_S)
    alive = [(key.hex(), info) for key, info in found.items() if info.state == 0]  # GcsNodeInfo.ALIVE
    return [key for key, info in alive if is_own(info.node_manager_address)]


def is_own(address: str) -> bool:
    """Whether a network address belongs to this machine."""
    return interface_of(address) is not None


def announce(address: str, nodes: Sequence[str], seconds: float) -> None:
    """Tells the cluster that these nodes go in so many seconds.

    Raises:
        DrainError: it refuses.
    """
    from ray._raylet import GcsClient

    client = GcsClient(address=address)
    at_ms = int((time.time() + seconds) * 1000)
    for node in nodes:
        accepted, why = client.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "this machine is about to go", at_ms)
        if not accepted:
            raise DrainError(f"the cluster at {address} refuses to drain the node {node}: {why}")


def ranks_here(processes: Path = Path("/proc")) -> list[int]:
    """Processes of ranks on this machine, or in this container."""
    found = []
    for path in processes.glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(RANK_TITLE):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_for_ranks(seconds: float) -> bool:
    """Whether no rank is left here, after waiting for it at most so long."""
    deadline = time.monotonic() + seconds
    while ranks_here():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Gives the notice and waits; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", ""), help="HEAD:PORT (default: RAY_ADDRESS)")
    parser.add_argument("--seconds", type=float, default=120.0, help="until this machine goes (default: 120)")
    options = parser.parse_args(arguments)
    host, _, port = options.address.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--address {options.address!r} is not HEAD:PORT; give it, or set RAY_ADDRESS")
    began = time.monotonic()
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()  # Ray itself would try for long
        nodes = nodes_here(options.address)
        announce(options.address, nodes, options.seconds)
    except (OSError, RuntimeError, ImportError) as error:
        print(f"cluster.drain: the cluster at {options.address} was not told: {error}", file=sys.stderr)
        return 1
    print(f"cluster.drain: {len(nodes)} node(s) of this machine go in {options.seconds:g} s", flush=True)
    if wait_for_ranks(options.seconds - (time.monotonic() - began)):
        return 0
    print(f"cluster.drain: ranks are still here: processes {ranks_here()}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
