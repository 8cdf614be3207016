"""The `cluster` section of the configuration: how many workers, where, and how long to wait for them."""

from dataclasses import dataclass
from typing import Literal

OWN_LIMITS = ("load", "data", "forward", "exchange", "backward")  # sections that may have a limit of their own


@dataclass(frozen=True)
class ClusterConfig:
    """How the ranks are started.

    nodes 1 lets a scheduler pack the workers as tightly as it can; more than 1 asks for exactly that many machines
    with `workers / nodes` workers each. threads_per_worker 0 means the node's cores divided by its workers.

    A run that fails is started again from its newest checkpoint: `restarts` times for each kind of cause without a new
    checkpoint between, after backoff_s, doubled each time up to backoff_max_s. 0 restarts never. Where nodes are
    missing it waits wait_for_nodes_s for them, then goes on with the largest number of workers that the configuration
    can run on, but not with fewer than min_workers; when the nodes are back it grows again.

    A rank that stays in one section longer than its limit hangs, and is killed: limit_start_s is for start, and for
    load unless that has its own, limit_save_s for save, limit_step_s for each other section of a step unless that has
    its own. 0 sets no limit. Below parallel.timeout_s, limit_step_s comes before the other ranks' collectives give up.
    """

    nodes: int = 1
    workers: int = 2  # ranks in total, over all nodes
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads_per_worker: int = 0
    cpus_per_worker: int = 1  # what each worker reserves from Ray
    start_timeout_s: float = 120.0  # until every rank runs its entry
    stop_grace_s: float = 60.0  # from a request to stop until the ranks are killed
    failure_grace_s: float = 3.0  # the same for the others after one rank has failed
    unresponsive_s: float = 300.0  # a Ray worker that answers nothing for so long counts as dead
    capacity_wait_s: float = 0.0  # how long a Ray cluster may take to grow to the size asked for
    restarts: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    wait_for_nodes_s: float = 60.0
    min_workers: int = 1
    limit_start_s: float = 1800.0
    limit_step_s: float = 450.0
    limit_save_s: float = 2400.0
    limit_load_s: float | None = None
    limit_data_s: float | None = None
    limit_forward_s: float | None = None
    limit_exchange_s: float | None = None  # a layer's dispatch, experts and combination, in the forward
    limit_backward_s: float | None = None

    def problems(self) -> list[str]:
        """Every rule that this section breaks, each with its key, value and a way out."""
        found = []
        for name in ("nodes", "workers", "cpus_per_worker", "min_workers"):
            value = getattr(self, name)
            if value < 1:
                found.append(f"cluster.{name} = {value} must be at least 1")
        if self.nodes >= 1 and self.workers >= 1 and self.workers % self.nodes:
            below, above = self.workers // self.nodes * self.nodes, (self.workers // self.nodes + 1) * self.nodes
            fitting = f"{below} or {above}" if below else f"{above}"
            found.append(
                f"cluster.workers = {self.workers} cannot be spread evenly over cluster.nodes = {self.nodes}; "
                f"use {fitting} workers, or nodes 1"
            )
        if self.accelerator not in ("auto", "cpu", "gpu"):
            found.append(f"cluster.accelerator = {self.accelerator!r} is not known; use 'auto', 'cpu' or 'gpu'")
        if self.threads_per_worker < 0:
            found.append(
                f"cluster.threads_per_worker = {self.threads_per_worker} must be 0 (cores divided by workers) or more"
            )
        for name in ("start_timeout_s", "stop_grace_s", "failure_grace_s", "unresponsive_s"):
            value = getattr(self, name)
            if not value > 0:
                found.append(f"cluster.{name} = {value} must be more than 0 seconds")
        if self.restarts < 0:
            found.append(f"cluster.restarts = {self.restarts} must be 0 (never start again) or more")
        if self.min_workers > self.workers >= 1:
            found.append(
                f"cluster.min_workers = {self.min_workers} is more than cluster.workers = {self.workers}; "
                f"use {self.workers} or fewer"
            )
        for name in ("backoff_s", "backoff_max_s", "wait_for_nodes_s"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                found.append(f"cluster.{name} = {value} must be 0 or more seconds")
        for name in ("start", "step", "save", *OWN_LIMITS):
            value = getattr(self, f"limit_{name}_s")
            if value is not None and not 0 <= value < float("inf"):
                found.append(f"cluster.limit_{name}_s = {value} must be 0 (no limit) or more seconds")
        if self.capacity_wait_s < 0:
            found.append(f"cluster.capacity_wait_s = {self.capacity_wait_s} must be 0 (do not wait) or more seconds")
        return found
