"""Compares the parameters that several ranks hold: where a bit flipped in one rank's memory, that rank is named.

What is replicated depends on the engine. Without ZeRO and in its stages 0 to 2 every rank holds all working weights but
the experts', which the ranks of an `edp_group` share. In stages 1 and 2 a step overwrites the working weights from the
fp32 masters, which exist once: a flip in the former is gone after the next step, and can only be seen if this step is
compared. In stage 3 parameters are cut up and exist once, but for the small ones that DeepSpeed keeps whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.naming import is_expert
from parallel.communicator import Communicator
from parallel.ranks import Ranks

_MAX_NAMED = 8  # parameters
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaMismatchError(RuntimeError):
    """Ranks hold different values of a parameter that must be the same."""


def checksum(values: Tensor) -> Tensor:
    """A 0-d int64 that changes with any one bit: the sum of the numbers' bits read as integers, wrapping around."""
    bits = values.detach().contiguous().view(-1).view(_WIDTHS[values.element_size()])
    return bits.sum(dtype=torch.int64)


def replicated(module: nn.Module, *, experts: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters that this rank holds whole: the stacked experts, or all others."""
    for name, parameter in module.named_parameters():
        if is_expert(name) != experts:
            continue
        status = getattr(parameter, "ds_status", None)  # of ZeRO stage 3
        if status is None or status.name == "AVAILABLE":
            yield name, parameter.data


def check(module: nn.Module, ranks: Ranks) -> None:
    """Compares all replicated parameters over their groups; collective. Two all-reduces where all is well.

    Raises:
        ReplicaMismatchError: on every rank, naming the ranks that differ from most and the parameters.
    """
    named = {experts: list(replicated(module, experts=experts)) for experts in (False, True)}
    sums = {experts: _sums([values for _, values in of_kind]) for experts, of_kind in named.items()}
    differs = not _same(sums[False], ranks.dp) or not _same(sums[True], ranks.edp)
    if not int(ranks.dp.all_reduce(torch.tensor([int(differs)], dtype=torch.int64))):
        return
    group = ranks.layout.rank % ranks.layout.ep_size  # ranks of an edp_group hold the same experts
    mine = {
        f"{name}" if not experts else f"{name} (expert-parallel rank {group})": int(total)
        for experts in (False, True)
        for (name, _), total in zip(named[experts], sums[experts].tolist(), strict=True)
    }
    raise ReplicaMismatchError(describe(ranks.dp.gather(mine)))


def _sums(tensors: list[Tensor]) -> Tensor:
    """(P,) int64 on the CPU."""
    return torch.stack([checksum(values) for values in tensors]).cpu() if tensors else torch.zeros(0, dtype=torch.int64)


def _same(sums: Tensor, group: Communicator) -> bool:
    if group.size == 1 or not sums.numel():
        return True
    both = group.all_reduce(torch.cat((sums, -sums)), "max")  # the largest, and minus the smallest
    most, least = both[: len(sums)], -both[len(sums) :]
    return bool(torch.equal(most, least))


def describe(by_rank: list[dict[str, int]]) -> str:
    """Who differs in what, from every rank's checksums by parameter; pure."""
    odd: dict[int, list[str]] = {}
    torn: list[str] = []  # parameters of which no value is that of most
    for name in dict.fromkeys(name for sums in by_rank for name in sums):
        holders: dict[int, list[int]] = {}
        for rank, sums in enumerate(by_rank):
            if name in sums:
                holders.setdefault(sums[name], []).append(rank)
        if len(holders) == 1:
            continue
        most, *others = sorted(holders.values(), key=len, reverse=True)
        if 2 * len(most) > sum(map(len, holders.values())):
            for rank in (rank for ranks in others for rank in ranks):
                odd.setdefault(rank, []).append(name)
        else:
            torn.append(f"{name} (ranks {' and '.join(map(str, [most, *others]))})")
    found = [f"rank {rank} differs from most in {_listed(names)}" for rank, names in sorted(odd.items())]
    if torn:
        found.append(f"no value is that of most in {_listed(torn)}")
    return (
        f"{'; '.join(found)}: replicated parameters are not the same, which can only come from damaged memory or a "
        "rank that ran other code; go back to the last checkpoint, and take the named rank's node out if it happens "
        "again"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
