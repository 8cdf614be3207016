"""What a Ray cluster can place: the rules in pure functions, and the wait for a placement group that they explain."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.config import ClusterConfig

LOOK_S = 0.3
SAY_AFTER_S = 2.0  # of waiting
SAY_EVERY_S = 30.0


class Shortage(Exception):
    """The cluster's nodes cannot hold the workers; nothing has started."""


class NoRoom(Exception):
    """The cluster's nodes could hold the workers, but others kept them busy; nothing has started."""


class StoppedWaiting(Exception):
    """A stop was asked for before there was room; nothing has started."""


def capacity_problem(spec: ClusterConfig, nodes: Sequence[Mapping[str, float]], use_gpu: bool) -> str | None:
    """Why the cluster cannot place the workers, None when it can.

    Args:
        nodes: the total resources of each living node, as Ray counts them ({"CPU": 4.0, "GPU": 1.0, ...}).
    """
    fits = [places(node, spec, use_gpu) for node in nodes]
    offer = "; ".join(f"node {n}: {r.get('CPU', 0):g} CPU, {r.get('GPU', 0):g} GPU" for n, r in enumerate(nodes, 1))
    each = f"{spec.cpus_per_worker} CPU" + (" and 1 GPU" if use_gpu else "")
    if spec.nodes > 1:
        per_node = spec.workers // spec.nodes
        wide_enough = sum(fit >= per_node for fit in fits)
        if wide_enough < spec.nodes:
            return (
                f"cluster.nodes = {spec.nodes} with {per_node} workers each ({each} per worker) do not fit: only "
                f"{wide_enough} of the Ray cluster's {len(nodes)} nodes hold that many ({offer}); "
                f"use fewer nodes or workers, or add nodes"
            )
    elif sum(fits) < spec.workers:
        return (
            f"cluster.workers = {spec.workers} ({each} each) is more than the Ray cluster can place: it has room for "
            f"{sum(fits)} ({offer}); use at most {sum(fits)} workers, or add nodes"
        )
    return None


def places(node: Mapping[str, float], spec: ClusterConfig, use_gpu: bool) -> int:
    """How many workers a node with these resources holds."""
    count = int(node.get("CPU", 0) // spec.cpus_per_worker)
    return min(count, int(node.get("GPU", 0))) if use_gpu else count


def wants_gpu(spec: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether each worker reserves a GPU; "auto" means: where any node has one."""
    if spec.accelerator == "auto":
        return any(node.get("GPU", 0) >= 1 for node in nodes)
    return spec.accelerator == "gpu"


def bundles_of(spec: ClusterConfig, workers: int, use_gpu: bool) -> tuple[list[dict[str, float]], str]:
    """The placement group's bundles and strategy: one bundle a worker, or one a node where nodes are asked for."""
    need: dict[str, float] = {"CPU": spec.cpus_per_worker}
    if use_gpu:
        need["GPU"] = 1
    per_node = spec.workers // spec.nodes
    if spec.nodes > 1 and workers % per_node == 0:  # so that every node gets the same number of workers
        return [{name: amount * per_node for name, amount in need.items()}] * (workers // per_node), "STRICT_SPREAD"
    return [dict(need)] * workers, "PACK"


def make_group(bundles: list[dict[str, float]], strategy: str, avoid: Sequence[str]) -> Any:
    """A placement group that is pending at first; nodes whose ids are in `avoid` are left out."""
    from ray.util.placement_group import placement_group

    elsewhere = [{"ray.io/node-id": f"!in({','.join(avoid)})"}] * len(bundles) if avoid else None
    return placement_group(bundles, strategy=strategy, bundle_label_selector=elsewhere)


def placeable_nodes() -> list[Mapping[str, float]]:
    """The total resources of each living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Mapping[str, float]]:
    """What is free on each living node; Ray has no public call for it."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def wait_for_room(
    group: Any, spec: ClusterConfig, use_gpu: bool, asked_to_stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Returns when the placement group has its room, and says while it waits what it waits for.

    An autoscaler starts nodes for a group that is pending, and for nothing else. Nodes that are too few in all are
    waited for during capacity_wait_s, nodes that others use during start_timeout_s if that is longer.

    Args:
        say: receives whole lines.

    Raises:
        Shortage, NoRoom, StoppedWaiting: see there.
    """
    began = time.monotonic()
    next_word = began + SAY_AFTER_S
    n_nodes = 0
    while not group.wait(timeout_seconds=LOOK_S):
        waited = time.monotonic() - began
        if asked_to_stop():
            raise StoppedWaiting(
                f"stopped on request after {waited:.0f} s of waiting for room for {spec.workers} workers; nothing had "
                "started"
            )
        nodes = placeable_nodes()
        problem = capacity_problem(spec, nodes, use_gpu)
        limit = spec.capacity_wait_s if problem else max(spec.capacity_wait_s, spec.start_timeout_s)
        if waited >= limit and problem and len(nodes) >= n_nodes:
            raise Shortage(f"{problem}. The driver waited {spec.capacity_wait_s:g} s (cluster.capacity_wait_s)")
        if waited >= limit:
            raise NoRoom(
                f"the driver waited {waited:.0f} s for room for {spec.workers} workers: {_room(spec, use_gpu)}. Give "
                f"cluster.capacity_wait_s={max(600, 2 * round(limit))} to queue for longer, or fewer workers"
            )
        if time.monotonic() >= next_word:
            next_word = time.monotonic() + SAY_EVERY_S
            why = "the cluster's nodes are too few for all" if problem else "others use the rest"
            say(
                f"ray: pending, room for {_room(spec, use_gpu)}; {why}; waiting up to {limit:g} s "
                "(cluster.capacity_wait_s, or start_timeout_s)\n"
            )
        n_nodes = len(nodes)


def _room(spec: ClusterConfig, use_gpu: bool) -> str:
    """How many workers fit into what is free now, and what that is."""
    free = free_nodes()
    count = min(spec.workers, sum(places(node, spec, use_gpu) for node in free))
    return (
        f"{count} of {spec.workers} workers now ({spec.cpus_per_worker} CPU{' and 1 GPU' if use_gpu else ''} each; "
        f"free are {_sum(free, 'CPU'):g} CPU and {_sum(free, 'GPU'):g} GPU on {len(free)} node{'s' * (len(free) != 1)})"
    )


def _sum(nodes: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(node.get(name, 0) for node in nodes)
