"""One rank of `trimtab bench dispatch`: every way of sending the same tokens, in turns. A program of its own:

python -m launch.bench_dispatch_rank FOLDER RANK      (through Gloo; FOLDER holds shape.json)
mpiexec -n 2 python -m launch.bench_dispatch_rank FOLDER mpi
"""

# T tokens of a rank, D hidden, I expert width, E experts, K top-k, N = T*K choices

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench_link import Link, SlowCommunicator
from model.mlp import MLP
from model.moe import Experts
from parallel.communicator import Communicator
from parallel.exchange import AllToAllExchange
from parallel.ranks import Ranks, join_process_group, process_ranks


@dataclass(frozen=True)
class Shape:
    """What is sent. nodes: 1, or so many modelled ones with a link of `gigabits` and `latency_us` between them.
    width: I of the experts and of the shared one where work is measured with the exchange."""

    ranks: int = 2
    nodes: int = 1
    tokens: int = 2048
    hidden: int = 256
    width: int = 128
    experts: int = 16
    top_k: int = 4
    gigabits: float = 1.0
    latency_us: float = 50.0
    repeats: int = 9


ROUTINGS = ("natural", "even")


def choose(shape: Shape, rank: int, routing: str) -> Tensor:
    """(T, K) experts: `even` gives each the same, `natural` draws them with popularities that differ."""
    token = torch.arange(shape.tokens)[:, None]
    if routing == "even":
        stride = max(1, shape.experts // shape.top_k)
        return (token + stride * torch.arange(shape.top_k)) % shape.experts
    generator = torch.Generator().manual_seed(100 + rank)
    liked = torch.randn(shape.experts, generator=torch.Generator().manual_seed(99))
    return (liked + torch.randn(shape.tokens, shape.experts, generator=generator)).topk(shape.top_k).indices


def names(shape: Shape) -> dict[str, dict[str, Any]]:
    """The ways of sending, by name. work: with experts and a shared expert; hide: let them run while rows travel."""
    ways: dict[str, dict[str, Any]] = {
        "a row a choice": {"kind": "all_to_all"},
        "dedup": {"kind": "dedup"},
        "dedup, 2 chunks": {"kind": "dedup", "chunks": 2},
        "dedup, bf16": {"kind": "dedup", "payload": "bf16"},
    }
    if shape.nodes > 1:
        ways["two hops"] = {"kind": "two_hop"}
        ways["two hops, bf16"] = {"kind": "two_hop", "payload": "bf16"}
    best = "two_hop" if shape.nodes > 1 else "dedup"
    ways["layer, nothing hidden"] = {"kind": best, "work": True, "hide": False}
    ways["layer, shared expert meanwhile"] = {"kind": best, "work": True, "hide": True}
    ways["layer, meanwhile and 2 chunks"] = {"kind": best, "work": True, "hide": True, "chunks": 2}
    ways["layer, meanwhile and 4 chunks"] = {"kind": best, "work": True, "hide": True, "chunks": 4}
    return ways


def handed_through(rows: Tensor, token_of_row: Tensor, _: Any, weights: Tensor, *parameters: Tensor) -> Tensor:
    """Experts that do nothing but the weighted sum."""
    total = torch.zeros(rows.shape[0]).index_add(0, token_of_row, weights)
    return rows * total[:, None].to(rows.dtype)


class Ways:
    """All ways over one set of communicators."""

    def __init__(self, shape: Shape, ranks: Ranks) -> None:
        self.shape, self.ranks = shape, ranks
        per_node = shape.ranks // shape.nodes
        link = Link(shape.gigabits, shape.latency_us * 1e-6)

        def slow(communicator: Communicator | None, members: list[int]) -> Any:
            if communicator is None or shape.nodes == 1:
                return communicator
            here = ranks.layout.rank // per_node
            return SlowCommunicator(communicator, [member // per_node != here for member in members], link)

        everyone, seat = list(range(shape.ranks)), ranks.layout.rank % per_node
        self.ep = slow(ranks.ep, everyone)
        self.nodes = slow(ranks.nodes, everyone[seat::per_node])
        self.inside = slow(ranks.inside, everyone[:0] if ranks.inside is None else ranks.layout.inside_groups()[
            ranks.layout.rank // per_node])  # fmt: skip
        generator = torch.Generator().manual_seed(ranks.layout.rank)
        self.x = torch.randn(shape.tokens, shape.hidden, generator=generator)
        self.gates = torch.rand(shape.tokens, shape.top_k, generator=generator)
        self.module = Experts(shape.experts // shape.ranks, shape.hidden, shape.width)
        self.shared = MLP(shape.hidden, shape.width)
        for parameter in (*self.module.parameters(), *self.shared.parameters()):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)

    def exchange(self, options: dict[str, Any]) -> AllToAllExchange:
        """Of a way."""
        plain = {key: options[key] for key in ("kind", "chunks", "payload") if key in options}
        return AllToAllExchange(self.ep, nodes=self.nodes, inside=self.inside, **plain)

    def once(self, ids: Tensor, options: dict[str, Any]) -> None:
        """One forward and backward."""
        exchange, x = self.exchange(options), self.x.clone().requires_grad_()
        if not options.get("work"):
            scale = torch.ones((), requires_grad=True)
            out, _ = exchange.run(x, ids, self.gates, self.shape.experts, handed_through, (scale,))
        elif options["hide"]:
            out, aside = self.module(x, ids, self.gates, self.shape.experts, exchange, lambda: self.shared(x), "")
            out = out + aside
        else:
            aside = self.shared(x)
            out, _ = self.module(x, ids, self.gates, self.shape.experts, exchange, None, "")
            out = out + aside
        out.sum().backward()

    def plain(self, ids: Tensor) -> Callable[[], None]:
        """torch's all_to_all_single alone: a row a choice, there and back, twice, with sizes known beforehand."""
        goal = torch.div(ids, self.shape.experts // self.shape.ranks, rounding_mode="floor")
        sent = torch.bincount(goal.flatten(), minlength=self.shape.ranks)
        ones = [1] * self.shape.ranks
        came = self.ranks.ep.all_to_all(sent, ones, ones).tolist()
        rows = self.x.repeat_interleave(self.shape.top_k, 0)[torch.argsort(goal.flatten(), stable=True)]

        def go() -> None:
            for _ in range(2):
                self.ep.all_to_all(self.ep.all_to_all(rows, sent.tolist(), came), came, sent.tolist())

        return go


def measure(shape: Shape, rank: int, folder: Path) -> list[dict[str, Any]]:
    """All ways and routings in turns; times are those of the slowest rank."""
    torch.set_num_threads(1)
    join_process_group(f"file://{folder}/rendezvous", rank, shape.ranks, "gloo", 300, None)
    ranks = process_ranks(shape.ranks, 300, shape.ranks // shape.nodes)
    ways = Ways(shape, ranks)
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for routing in ROUTINGS:
        ids = choose(shape, rank, routing)
        runs[routing, "torch all_to_all_single"] = ways.plain(ids)
        for name, options in names(shape).items():
            runs[routing, name] = partial(ways.once, ids, options)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    sent: dict[tuple[str, str], list[int]] = {}
    for number in range(shape.repeats + 1):  # the first warms up
        for key, go in runs.items():
            ranks.dp.barrier()
            ranks.ep.traffic.reset()
            before = _far_bytes(ways)
            started = time.perf_counter()
            go()
            seconds = time.perf_counter() - started
            traffic = ranks.ep.traffic.reset()
            most = torch.tensor([seconds, traffic.exposed_seconds], dtype=torch.float64)
            ranks.dp.all_reduce(most, "max")
            nbytes = torch.tensor([traffic.bytes_sent, _far_bytes(ways) - before])
            sent[key] = ranks.dp.all_reduce(nbytes, "max").tolist()
            if number:
                found[key].append((float(most[0]), float(most[1])))
    ranks.dp.barrier()
    dist.destroy_process_group()  # its threads must be gone before the interpreter is
    return [
        {
            "routing": routing, "way": name, "seconds": [one[0] for one in found[routing, name]],
            "exposed_seconds": [one[1] for one in found[routing, name]], "bytes_sent": sent[routing, name][0],
            "bytes_between_nodes": sent[routing, name][1],
        }
        for routing, name in runs
    ]  # fmt: skip


def _far_bytes(ways: Ways) -> int:
    return sum(one.far_bytes for one in (ways.ep, ways.nodes, ways.inside) if isinstance(one, SlowCommunicator))


def measure_mpi(shape: Shape) -> list[dict[str, Any]]:
    """mpi4py's Alltoallv with the rows and sizes of `Ways.plain`."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    rank = world.Get_rank()
    results = []
    for routing in ROUTINGS:
        goal = torch.div(choose(shape, rank, routing), shape.experts // shape.ranks, rounding_mode="floor")
        sent = torch.bincount(goal.flatten(), minlength=shape.ranks)
        everywhere = torch.zeros(shape.ranks, shape.ranks, dtype=torch.int64)
        world.Allgather(sent.numpy(), everywhere.numpy())  # in lower case it would pickle
        came = everywhere[:, rank].contiguous()
        out, back = torch.zeros(int(sent.sum()), shape.hidden), torch.zeros(int(came.sum()), shape.hidden)
        sizes = [(counts * shape.hidden).tolist() for counts in (sent, came)]
        there = [[out.numpy(), sizes[0], MPI.FLOAT], [back.numpy(), sizes[1], MPI.FLOAT]]
        seconds = []
        for number in range(shape.repeats + 1):
            world.Barrier()
            started = time.perf_counter()
            for _ in range(2):
                world.Alltoallv(*there)
                world.Alltoallv(*reversed(there))
            slowest = np.array([time.perf_counter() - started])
            world.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
            if number:
                seconds.append(float(slowest[0]))
        own = [int(counts.sum() - counts[rank]) for counts in (sent, came)]
        nbytes = np.array([2 * sum(own) * shape.hidden * 4], np.int64)
        world.Allreduce(MPI.IN_PLACE, nbytes, op=MPI.MAX)
        results.append({"routing": routing, "way": "mpi4py Alltoallv", "seconds": seconds, "exposed_seconds": seconds,
                        "bytes_sent": int(nbytes[0]), "bytes_between_nodes": 0})  # fmt: skip
    return results if rank == 0 else []


def main(folder: Path, who: str) -> None:
    """Reads shape.json, measures, and rank 0 writes its result beside it."""
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    rows = measure_mpi(shape) if who == "mpi" else measure(shape, int(who), folder)
    if rows and who in ("mpi", "0"):
        (folder / f"{'mpi' if who == 'mpi' else 'gloo'}.json").write_text(json.dumps(rows))


def write_shape(shape: Shape, folder: Path) -> None:
    """For the ranks to read."""
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
