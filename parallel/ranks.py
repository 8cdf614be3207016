"""One rank's place and the three groups it talks to, for processes, virtual ranks, or a world of one."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.communicator import Communicator, ProcessCommunicator, SingleCommunicator
from parallel.layout import Layout
from parallel.threads import VirtualWorld


@dataclass(frozen=True)
class Ranks:
    """dp: all ranks. ep: those that together hold every expert once. edp: those that hold the same experts."""

    layout: Layout
    dp: Communicator
    ep: Communicator
    edp: Communicator


def single_rank() -> Ranks:
    """A world of one rank."""
    return Ranks(Layout(1, 1, 0), SingleCommunicator(), SingleCommunicator(), SingleCommunicator())


def virtual_ranks(world: VirtualWorld, ep_size: int, rank: int) -> Ranks:
    """The groups of a virtual rank (a thread)."""
    layout = Layout(world.size, ep_size, rank)
    return Ranks(
        layout,
        world.communicator(list(range(world.size)), rank),
        world.communicator(layout.ep_groups()[layout.edp_rank], rank),
        world.communicator(layout.edp_groups()[layout.ep_rank], rank),
    )


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


def process_ranks(ep_size: int, timeout_s: float) -> Ranks:
    """Creates the groups of this process; collective over the default process group, which must exist.

    A group that would be the whole world is the default group, and a group of one rank needs no group at all.
    """
    layout = Layout(dist.get_world_size(), ep_size, dist.get_rank())
    timeout = timedelta(seconds=timeout_s)

    def communicator(groups: list[list[int]]) -> Communicator:
        if len(groups[0]) == 1:
            return SingleCommunicator()
        if len(groups[0]) == layout.world_size:
            return ProcessCommunicator()
        made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]  # every rank makes every group
        mine = next(i for i, ranks in enumerate(groups) if layout.rank in ranks)
        return ProcessCommunicator(made[mine])

    dp: Communicator = ProcessCommunicator() if layout.world_size > 1 else SingleCommunicator()
    return Ranks(layout, dp, communicator(layout.ep_groups()), communicator(layout.edp_groups()))


def choose_device(accelerator: str, local_rank: int) -> torch.device:
    """The device of a rank: `auto` takes the local rank's GPU where there is one.

    Raises:
        RuntimeError: `gpu` was asked for and there is none for this local rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "cpu" or (accelerator == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise RuntimeError(
            f"cluster.accelerator = {accelerator!r}: local rank {local_rank} has no GPU of its own, this node shows "
            f'{count}; start at most {count} workers a node, or use cluster.accelerator = "cpu"'
        )
    return torch.device("cuda", local_rank)
