"""Which of the GPUs that a process sees is its own, where the processes of a node see all, some, or one each."""

from collections.abc import Sequence


def visible_gpus(accelerator: str) -> list[str]:
    """The UUIDs of the GPUs that torch shows this process, by device number; none where the CPU is asked for."""
    if accelerator == "cpu":
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def own_gpus(seen: Sequence[Sequence[str]]) -> list[int | None]:
    """For each rank of one node the number, among those it sees, of a GPU that no other rank takes; None: none is left.

    Ranks that see the same GPUs take one after the other; ranks that see one each (`srun --gpus-per-task=1`) take
    number 0.

    Args:
        seen: the UUIDs that each rank of the node sees, by local rank.
    """
    taken: set[str] = set()
    chosen: list[int | None] = []
    for uuids in seen:
        number = next((number for number, uuid in enumerate(uuids) if uuid not in taken), None)
        if number is not None:
            taken.add(uuids[number])
        chosen.append(number)
    return chosen


def without_gpu(nodes: Sequence[Sequence[Sequence[str]]], ranks: Sequence[Sequence[int]]) -> str:
    """A clause that names the ranks without a GPU of their own, with what they see; empty where all have one.

    Args:
        nodes: for each node what `own_gpus` takes.
        ranks: the world's numbers of the same ranks.
    """
    parts = []
    for seen, numbers in zip(nodes, ranks, strict=True):
        for local, number in enumerate(own_gpus(seen)):
            if number is None:
                rivals = [str(r) for r, uuids in zip(numbers, seen, strict=True) if set(uuids) & set(seen[local])]
                shared = f"shares {len(seen[local])} with ranks {', '.join(rivals)}" if seen[local] else "sees none"
                parts.append(f"rank {numbers[local]} {shared}")
    more = f"; and {len(parts) - 4} ranks more" if len(parts) > 4 else ""
    return "; ".join(parts[:4]) + more
