"""How many CPU cores this process may use, and how many threads each of a node's ranks gets."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def affinity() -> set[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota_cores(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The cores' worth of time that this process's control groups allow, rounded up; None is no limit.

    The smallest limit of the group and all above it counts. Both versions are read: `cpu.max` of version 2, and
    `cpu.cfs_quota_us` with `cpu.cfs_period_us` of version 1 (Documentation/admin-guide/cgroup-v2.rst and
    Documentation/scheduler/sched-bwc.rst of Linux).
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers == "":
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        for mount in mounts:
            # A container often sees its own group as the mount's root, while the path still names it from outside.
            limits += [_limit(mount.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    known = [limit for limit in limits if limit is not None]
    return max(1, math.ceil(min(known))) if known else None


def _limit(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()[:2]
            return None if quota == "max" else int(quota) / int(period)
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        return quota_us / int((group / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def usable_cores() -> int:
    """The cores that this process may run on, or fewer where a control group allows less time than they have."""
    cores, quota = len(affinity()), quota_cores()
    return max(1, cores if quota is None else min(cores, quota))


def stated_threads(environment: Mapping[str, str]) -> int | None:
    """The number of threads that the user asks for with OMP_NUM_THREADS ("8", or "8,2" for nested ones), if any."""
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def share_of_node(mine: set[int], all_of_node: Sequence[set[int]], quota: int | None) -> int:
    """Threads of one rank where the node's ranks may each run on certain cores.

    Cores that several ranks may use are divided among them; a rank that is bound to cores of its own keeps all those.

    Args:
        mine: this rank's cores.
        all_of_node: the cores of each rank of the node, this one's as well.
        quota: the cores' worth of time that the node's ranks have together, None is no limit.
    """
    rivals = [cores for cores in all_of_node if cores & mine]
    threads = len(set().union(*rivals)) // max(1, len(rivals))
    if quota is not None:
        threads = min(threads, quota // len(all_of_node))
    return max(1, min(threads, len(mine)))
