"""The Ray launcher, driver side: connects, checks that the workers fit, and runs a gang of actors."""

import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.context import EXIT_FAILED, LaunchResult
from cluster.entry import encode
from cluster.flag import StopFlag
from cluster.local import print_line
from cluster.outcome import conclude, refused
from cluster.ray_access import cluster_problem, gcs_address_problem
from cluster.ray_capacity import NoRoom, Shortage, StoppedWaiting, capacity_problem, placeable_nodes, wants_gpu
from cluster.ray_gang import Gang, GangError, Unshared
from cluster.ray_python import cluster_python
from cluster.signals import StopSignals
from cluster.staging import ROOMS, stage

if TYPE_CHECKING:
    from cluster.ray_pool import RayPool

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job
REACH_S = 10.0


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
    shared: Sequence[Path] = (),
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
        shared: folders that every worker's node has to see and may write; the launch is refused where one does not.
    """
    text = encode(payload, "the payload")
    log_dir = Path(log_dir).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    with StopSignals(stop) as signals:
        connection = pool.connection if pool else Connection(code, folders, insecure)
        try:
            connection.open(spec.start_timeout_s)
            signals.install()  # ray.init takes SIGTERM for itself
            nodes = placeable_nodes()
            use_gpu = wants_gpu(spec, nodes)
            if not spec.capacity_wait_s and (problem := capacity_problem(spec, nodes, use_gpu)):
                return refused(spec.workers, problem)
            if pool:
                pool.order(0)  # what was ordered is taken now
            gang = Gang(spec, log_dir, signals, on_output, use_gpu, leave, pool.avoided() if pool else ())
            try:
                gang.place(shared)
                if pool:
                    pool.in_use = {worker.place["node_id"] for worker in gang.workers}
                gang.begin(entry, text, generation, ep_size)
                gang.wait()
            except GangError as error:
                gang.lost.append(error.failure)
            finally:
                gang.end()
            return conclude(gang.reports, gang.lost, signals.stop.is_set())
        except (Shortage, Unshared, RefusedError) as error:
            return refused(spec.workers, str(error))
        except NoRoom as error:
            return LaunchResult(EXIT_FAILED, [None] * spec.workers, str(error), reason="capacity")
        except StoppedWaiting as error:
            return LaunchResult(EXIT_FAILED, [None] * spec.workers, str(error))
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
        """Connects.

        Raises:
            RefusedError: it cannot work with these settings. ConnectionError: nobody answers, or not to this token.
        """
        try:
            import ray
        except ImportError:
            raise RefusedError(_no_ray()) from None
        if ray.is_initialized():
            return
        runtime_env: dict[str, Any] = {}
        if self._code and JOB_CONFIG not in os.environ:
            self._staged = Path(tempfile.mkdtemp(prefix="trimtab-code-"))
            stage(self._code, self._staged, folders=self._folders)
            runtime_env["working_dir"] = str(self._staged)
        given = os.environ.get("RAY_ADDRESS", "")
        if problem := gcs_address_problem(given):
            raise RefusedError(problem)
        where = given if given not in ("", "auto") else "this machine"
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
        except RuntimeError as error:
            self.close()
            if "Version mismatch" not in str(error):
                raise ConnectionError(f"Ray could not join the cluster at {where}: {error}") from error
            raise RefusedError(version_problem(str(error), where)) from None
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


class RefusedError(Exception):
    """The launch cannot work with what was given; nothing has started."""


def version_problem(text: str, where: str) -> str:
    """What to do about Ray's complaint that this process and the cluster run other versions of Ray or Python.

    Args:
        text: what `ray.init` raised: two parts, the cluster's first, with lines "Ray: 2.55.1" and "Python: 3.11.7".
    """
    rays, pythons = re.findall(r"\bRay:\s*(\S+)", text), re.findall(r"\bPython:\s*(\S+)", text)
    if len(rays) != 2 or len(pythons) != 2:
        return f"the Ray cluster at {where} and this process do not fit: {' '.join(text.split())}"
    theirs, ours = (f"Ray {ray} on Python {python}" for ray, python in zip(rays, pythons, strict=True))
    ways = []
    if rays[0] != rays[1]:
        ways.append(f"install ray=={rays[0]} here, or start the cluster again with Ray {rays[1]}")
    if pythons[0] != pythons[1]:
        ways.append(f"run both on one Python, {pythons[0]} or {pythons[1]}")
    ways.append("`trimtab submit --address` runs the job under the cluster's own Python")
    return f"the Ray cluster at {where} runs {theirs}, this process ({sys.executable}) {ours}; {'; '.join(ways)}"


def _no_ray() -> str:
    if JOB_CONFIG not in os.environ:
        return f"the Ray launcher needs Ray, which {sys.executable} lacks; install it with: pip install 'ray[default]'"
    theirs = cluster_python() or "unknown"
    return (
        f"the job's python is {sys.executable}, which has no Ray; the cluster's is {theirs}. Submit the job with that "
        "one, or put its folder first on PATH where `ray start` is called; launch/jobs/ray_cluster.sh does"
    )


class _OpenClusterError(Exception):
    """The cluster takes work from anybody."""


def _check_reachable(address: str, timeout_s: float) -> bool:
    """Whether the address is host:port. Raises: OSError, nothing answers there; ray.init itself would try a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    return True
