"""One rank's place and the three groups it talks to, for processes, virtual ranks, or a world of one."""

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.communicator import Communicator, ProcessCommunicator, SingleCommunicator, Traffic
from parallel.layout import Layout
from parallel.threads import VirtualWorld
from parallel.watch import Watch


@dataclass(frozen=True)
class Ranks:
    """dp: all ranks. ep: those that together hold every expert once. edp: those that hold the same experts.

    nodes, inside: where an ep group spans several nodes, its ranks with this rank's place in each node, and its ranks
    in this rank's node; None otherwise. Both count into ep's traffic. watch: where this rank is, and who is missing.
    """

    layout: Layout
    dp: Communicator
    ep: Communicator
    edp: Communicator
    nodes: Communicator | None = None
    inside: Communicator | None = None
    watch: Watch = field(default_factory=Watch)


def single_rank() -> Ranks:
    """A world of one rank."""
    return Ranks(Layout(1, 1, 0), SingleCommunicator(), SingleCommunicator(), SingleCommunicator())


def virtual_ranks(world: VirtualWorld, ep_size: int, rank: int, ranks_per_node: int = 0) -> Ranks:
    """The groups of a virtual rank (a thread); ranks_per_node 0: all on one node."""
    layout = Layout(world.size, ep_size, rank, ranks_per_node)
    ep = world.communicator(layout.ep_groups()[layout.edp_rank], rank)
    nodes, inside = (
        world.communicator(_mine(groups, rank), rank, ep.traffic) if groups else None
        for groups in (layout.node_groups(), layout.inside_groups())
    )
    return Ranks(
        layout,
        world.communicator(list(range(world.size)), rank),
        ep,
        world.communicator(layout.edp_groups()[layout.ep_rank], rank),
        nodes,
        inside,
    )


def _mine(groups: list[list[int]], rank: int) -> list[int]:
    return next(group for group in groups if rank in group)


def join_process_group(
    init_method: str, rank: int, world_size: int, backend: str, timeout_s: float, interface: str | None
) -> None:
    """Makes this process one rank of the default process group.

    Args:
        init_method: `file://` or `tcp://` rendezvous.
        backend: `gloo` or `nccl`.
        timeout_s: how long any collective may wait for its slowest rank, seconds.
        interface: network interface for Gloo, None for its own choice.
    """
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group(
        backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def process_ranks(ep_size: int, timeout_s: float, ranks_per_node: int = 0) -> Ranks:
    """Creates the groups of this process; collective over the default process group, which must exist.

    A group that would be the whole world is the default group, and a group of one rank needs no group at all.

    Args:
        ranks_per_node: neighbouring ranks that share a node; 0: all do.
    """
    layout = Layout(dist.get_world_size(), ep_size, dist.get_rank(), ranks_per_node)
    timeout = timedelta(seconds=timeout_s)
    # The store that the default group was made with; torch has no other name for it.
    watch = Watch(dist.distributed_c10d._get_default_store(), layout.rank, timeout_s)

    def communicator(groups: list[list[int]], traffic: Traffic | None = None) -> Communicator:
        if len(groups[0]) == 1:
            return SingleCommunicator()
        if len(groups[0]) == layout.world_size:
            return ProcessCommunicator(None, watch, traffic)
        made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]  # every rank makes every group
        mine = next(i for i, ranks in enumerate(groups) if layout.rank in ranks)
        return ProcessCommunicator(made[mine], watch, traffic)

    dp: Communicator = ProcessCommunicator(None, watch) if layout.world_size > 1 else SingleCommunicator()
    ep, edp = communicator(layout.ep_groups()), communicator(layout.edp_groups())
    nodes, inside = (
        communicator(groups, ep.traffic) if groups else None
        for groups in (layout.node_groups(), layout.inside_groups())
    )
    return Ranks(layout, dp, ep, edp, nodes, inside, watch)


def choose_device(accelerator: str, index: int | None, workers: int = 1) -> torch.device:
    """The device of a rank: `auto` takes GPUs where every worker that sees the same ones gets its own.

    Args:
        index: the rank's device number among those that it sees; None: not every rank has one.
        workers: how many ranks share the GPUs that this process sees.

    Raises:
        RuntimeError: `gpu` was asked for and there is none for this rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cpu" or (accelerator == "auto" and (count < max(1, workers) or index is None)):
        if accelerator == "auto" and 0 < count < workers and index == 0:
            print(
                f"device: cpu, since this node shows {count} GPU{'s' * (count > 1)} for {workers} workers", flush=True
            )
        return torch.device("cpu")
    if index is None or index >= count:
        raise RuntimeError(
            f"cluster.accelerator = {accelerator!r}: local rank {index} has no GPU of its own, this node shows "
            f'{count}; start at most {count} workers a node, or use cluster.accelerator = "cpu"'
        )
    return torch.device("cuda", index)
