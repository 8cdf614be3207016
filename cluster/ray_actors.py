"""The Ray launcher, driver side: connects, checks that the workers fit, and runs a gang of actors."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.context import EXIT_FAILED, LaunchResult
from cluster.entry import encode
from cluster.flag import StopFlag
from cluster.local import print_line
from cluster.outcome import conclude, refused
from cluster.ray_access import cluster_problem
from cluster.ray_gang import Gang, GangError
from cluster.signals import StopSignals
from cluster.staging import ROOMS, stage

if TYPE_CHECKING:
    from cluster.ray_pool import RayPool

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job
REACH_S = 10.0


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


def run(
    entry: str,
    payload: dict,
    spec: ClusterConfig,
    *,
    log_dir: Path,
    ep_size: int = 1,
    generation: int = 0,
    stop: StopFlag | None = None,
    on_output: Callable[[str], None] = print_line,
    code: Path | None = None,
    folders: Sequence[str] = ROOMS,
    pool: "RayPool | None" = None,
    leave: Callable[[], str] = lambda: "",
    insecure: bool = False,
) -> LaunchResult:
    """Runs the entry in spec.workers Ray actors of the cluster that RAY_ADDRESS (or this machine's Ray) names.

    SIGINT, SIGTERM or `stop` ask every rank to stop; after spec.stop_grace_s all are killed. When an actor dies or its
    entry raises, all are ended within seconds. In every case the actors and the placement group are gone at return.

    Args:
        log_dir: gets rank-N.log with all output of rank N, also from machines that do not share this folder.
        ep_size: expert groups of that many consecutive ranks are kept inside a node wherever they fit.
        on_output: receives what rank 0 prints, whole lines.
        code: the project's root. Its `folders` are sent to the workers when this driver is not part of a submitted
            job (whose working_dir they get anyway).
        pool: of a run that may be launched again: holds the connection, and the nodes to avoid.
        leave: asked now and then; any text makes the ranks stop as a signal would.
        insecure: also on a cluster that asks nobody for a token (without a pool; a pool's connection knows).
    """
    text = encode(payload, "the payload")
    log_dir = Path(log_dir).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    with StopSignals(stop) as signals:
        connection = pool.connection if pool else Connection(code, folders, insecure)
        try:
            connection.open(spec.start_timeout_s)
            signals.install()  # ray.init takes SIGTERM for itself
            use_gpu, problem = _check_capacity(spec, signals)
            if problem:
                return refused(spec.workers, problem)
            gang = Gang(spec, log_dir, signals, on_output, use_gpu, leave, pool.avoided() if pool else ())
            try:
                gang.place()
                if pool:
                    pool.in_use = {worker.place["node_id"] for worker in gang.workers}
                gang.begin(entry, text, generation, ep_size)
                gang.wait()
            except GangError as error:
                gang.lost.append(error.failure)
            finally:
                gang.end()
            return conclude(gang.reports, gang.lost, signals.stop.is_set())
        except ConnectionError as error:
            return LaunchResult(EXIT_FAILED, [None] * spec.workers, str(error))
        finally:
            if pool is None:
                connection.close()


class Connection:
    """This process as a driver of the cluster, unless it is one already.

    Args:
        code, folders, insecure: see `run`.
    """

    def __init__(self, code: Path | None, folders: Sequence[str], insecure: bool = False) -> None:
        self._code, self._folders, self._insecure = code, folders, insecure
        self._opened = False
        self._staged: Path | None = None

    def open(self, timeout_s: float) -> None:
        """Connects. Raises: ConnectionError, with what to do."""
        try:
            import ray
        except ImportError:
            raise ConnectionError("the Ray launcher needs Ray; install it with: pip install 'ray[default]'") from None
        if ray.is_initialized():
            return
        runtime_env: dict[str, Any] = {}
        if self._code and JOB_CONFIG not in os.environ:
            self._staged = Path(tempfile.mkdtemp(prefix="trimtab-code-"))
            stage(self._code, self._staged, folders=self._folders)
            runtime_env["working_dir"] = str(self._staged)
        where = os.environ.get("RAY_ADDRESS", "this machine")
        try:
            known = _check_reachable(where, min(timeout_s, REACH_S))
            if known:  # before anything is sent there
                self._check_access(where)
            ray.init(address="auto", log_to_driver=False, logging_level="WARNING", runtime_env=runtime_env or None)
            self._opened = True
            if not known:
                self._check_access(ray.get_runtime_context().gcs_address)
        except _OpenClusterError as error:
            self.close()
            raise ConnectionError(str(error)) from None
        except OSError as error:
            if "authentication token" in f"{error.__cause__}".lower():
                raise ConnectionError(
                    f"the Ray cluster at {where} refused the token; put its token into RAY_AUTH_TOKEN, or the name of "
                    f"the token's file into RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token"
                ) from error
            raise ConnectionError(
                f"no Ray cluster answers at {where} ({error}); start one with `ray start --head`, set RAY_ADDRESS, "
                f"or use another launcher"
            ) from error

    def _check_access(self, address: str) -> None:
        if not self._insecure and (problem := cluster_problem(address)):
            raise _OpenClusterError(problem)

    def close(self) -> None:
        """Disconnects, where `open` has connected."""
        if self._opened:
            import ray

            ray.shutdown()
            self._opened = False
        if self._staged:
            shutil.rmtree(self._staged, ignore_errors=True)


class _OpenClusterError(Exception):
    """The cluster takes work from anybody."""


def _check_reachable(address: str, timeout_s: float) -> bool:
    """Whether the address is host:port. Raises: OSError, nothing answers there; ray.init itself would try a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    return True


def places(node: Mapping[str, float], spec: ClusterConfig, use_gpu: bool) -> int:
    """How many workers a node with these resources holds."""
    count = int(node.get("CPU", 0) // spec.cpus_per_worker)
    return min(count, int(node.get("GPU", 0))) if use_gpu else count


def wants_gpu(spec: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether each worker reserves a GPU; "auto" means: where any node has one."""
    if spec.accelerator == "auto":
        return any(node.get("GPU", 0) >= 1 for node in nodes)
    return spec.accelerator == "gpu"


def _check_capacity(spec: ClusterConfig, signals: StopSignals) -> tuple[bool, str | None]:
    """Whether to reserve GPUs, and why the workers do not fit; waits capacity_wait_s for the cluster to grow."""
    import ray

    deadline = time.monotonic() + spec.capacity_wait_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpus = wants_gpu(spec, nodes)
        problem = capacity_problem(spec, nodes, on_gpus)
        if problem is None or time.monotonic() >= deadline or signals.stop.is_set():
            return on_gpus, problem
        time.sleep(1.0)
