"""What the ranks of an MPI world tell each other before they train: texts, problems, and that one of them gives up.

A rank that leaves after MPI_Init while others wait in a collective leaves them waiting for ever: MPI_Finalize waits for
everybody. So problems are exchanged and all ranks leave together, and whatever else escapes ends in MPI_Abort.
mpi4py's lower-case methods pickle what they send; these functions send bytes.
"""

import array
import json
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.context import EXIT_BAD_INPUT, EXIT_FAILED


class RefusedTogether(RuntimeError):
    """Every rank of the world raises this at once: the run must not start. All leave with `EXIT_BAD_INPUT`.

    Attributes:
        problems: a sentence each, of all ranks, each once.
        speaks: whether this rank is the one that prints them.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: list[str], speaks: bool) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.speaks = problems, speaks


def refuse_together(world: Any, problems: Sequence[str]) -> None:
    """Collective: shows every rank the problems of all.

    Raises:
        RefusedTogether: on every rank, where any rank has a problem; the lowest of those that have one speaks.
    """
    reports = [json.loads(text) for text in allgather_text(world, json.dumps([socket.gethostname(), list(problems)]))]
    found = combined([(host, told) for host, told in reports])
    if found:
        speaker = next(rank for rank, (_, told) in enumerate(reports) if told)
        raise RefusedTogether(found, speaks=world.Get_rank() == speaker)


def combined(reports: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The problems of all ranks, equal ones once, each with the ranks and hosts that have it.

    Args:
        reports: host name and problems of each rank, by rank.
    """
    holders: dict[str, list[int]] = {}
    for rank, (_, problems) in enumerate(reports):
        for problem in dict.fromkeys(problems):
            holders.setdefault(problem, []).append(rank)
    sentences = []
    for problem, ranks in holders.items():
        hosts = list(dict.fromkeys(reports[rank][0] for rank in ranks))
        if len(ranks) == len(reports):
            where = f"every rank, on {_listed(hosts)}" if len(reports) > 1 else hosts[0]
        else:
            where = f"rank {_listed([str(rank) for rank in ranks])} on {_listed(hosts)}"
        sentences.append(f"{problem} ({where})")
    return sentences


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unlike(world: Any, seen: Mapping[str, str]) -> list[str]:
    """Collective: a sentence for each thing that this rank sees otherwise than rank 0 does."""
    first = json.loads(broadcast_text(world, json.dumps(dict(seen)), root=0))
    return [
        f"{what} differs from what rank 0 has found; all nodes need the same files and the same options"
        for what, text in seen.items()
        if first[what] != text
    ]


@contextmanager
def done_by_first(world: Any, refusals: tuple[type[Exception], ...]) -> Iterator[bool]:
    """Collective: yields whether this is rank 0, which does its part inside; nobody goes on unless that succeeded.

    Args:
        refusals: what rank 0 may raise inside as a refusal of the run; a `problems` attribute is taken if there is one.

    Raises:
        RefusedTogether: on every rank, once rank 0 has raised one of the refusals.
    """
    first, problems = world.Get_rank() == 0, []
    try:
        yield first
    except refusals as error:
        problems = list(getattr(error, "problems", ())) or [f"{type(error).__name__}: {error}"]
    refuse_together(world, problems)


@contextmanager
def all_or_none(initialized_mpi: Any = None) -> Iterator[None]:
    """Inside, whatever escapes on one rank ends all ranks at once through MPI_Abort, with the reason and the host.

    `RefusedTogether` passes through, since all ranks raise it. So does everything while MPI is not in use.

    Args:
        initialized_mpi: mpi4py's module; None looks for it among the imported ones.
    """
    try:
        yield
    except RefusedTogether:
        raise
    except BaseException as error:
        mpi = initialized_mpi or sys.modules.get("mpi4py.MPI")
        if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else EXIT_FAILED
        place = f"rank {mpi.COMM_WORLD.Get_rank()} on {socket.gethostname()}"
        reason = "".join(traceback.format_exception(error))
        try:
            print(f"{place} gave up before training, so all ranks end:\n{reason}", file=sys.stderr, flush=True)
        finally:
            mpi.COMM_WORLD.Abort(code or EXIT_FAILED)


def allgather_int(communicator: Any, value: int) -> list[int]:
    """Every rank's number, by rank."""
    answer = array.array("q", [0] * communicator.Get_size())
    communicator.Allgather(array.array("q", [value]), answer)
    return list(answer)


def broadcast_text(communicator: Any, text: str, root: int) -> str:
    """The text of the rank `root`, of any length."""
    data = text.encode()
    size = array.array("q", [len(data)])
    communicator.Bcast(size, root=root)
    buffer = bytearray(data if communicator.Get_rank() == root else size[0])
    communicator.Bcast(buffer, root=root)
    return bytes(buffer).decode()


def allgather_text(communicator: Any, text: str) -> list[str]:
    """Every rank's text, by rank."""
    from mpi4py import MPI

    data = text.encode()
    sizes = allgather_int(communicator, len(data))
    answer = bytearray(sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    communicator.Allgatherv(data, [answer, sizes, starts, MPI.BYTE])
    return [answer[start : start + size].decode() for start, size in zip(starts, sizes, strict=True)]
