"""The `cluster` section of the configuration: how many workers, where, and how long to wait for them."""

from dataclasses import dataclass
from typing import Annotated, Literal

OWN_LIMITS = ("load", "data", "forward", "exchange", "backward")  # sections that may have a limit of their own


@dataclass(frozen=True)
class ClusterConfig:
    """How the ranks are started, watched and started again.

    A run that fails is started again from its newest checkpoint. Where nodes are missing it waits for them, then goes
    on with the largest number of workers that the configuration can run on; when the nodes are back it grows again.
    A rank that stays in one section longer than the section's limit hangs, and is killed.

    nodes: 1 lets a scheduler pack the workers as tightly as it can; more than 1 asks for exactly that many machines
        with `workers / nodes` workers each.
    workers: ranks in total, over all nodes.
    accelerator: `auto` takes the GPUs where there are any; `cpu` and `gpu` insist.
    threads_per_worker: CPU threads of each rank; 0 means OMP_NUM_THREADS, or the node's usable cores divided by its
        workers.
    cpus_per_worker: cores that each worker reserves from Ray.
    start_timeout_s: the longest time, in seconds, until every rank runs its entry.
    stop_grace_s: seconds from a request to stop until the ranks are killed.
    failure_grace_s: seconds that the other ranks have to stop after one rank has failed.
    unresponsive_s: a Ray worker that answers nothing for so many seconds counts as dead.
    capacity_wait_s: how many seconds a Ray cluster may take to grow to the size asked for, and a busy one until there
        is room; for the latter start_timeout_s counts if it is longer.
    restarts: restarts for each kind of cause without a new checkpoint between; 0 never restarts.
    backoff_s: seconds before the first restart; each further one waits twice as long.
    backoff_max_s: the longest wait before a restart, in seconds.
    wait_for_nodes_s: seconds that a restart waits for missing nodes before it goes on with fewer workers.
    min_workers: the run does not go on with fewer workers than this.
    limit_start_s: the longest start of a rank, in seconds, and the longest load unless that has a limit of its own;
        0 sets no limit, here and below.
    limit_step_s: the longest stay in each section of a step that has no limit of its own, in seconds. Below
        parallel.timeout_s it comes before the other ranks' collectives give up.
    limit_save_s: the longest save, in seconds.
    limit_load_s: the longest load of a checkpoint, in seconds; none means limit_start_s.
    limit_data_s: the longest wait for a batch, in seconds; none means limit_step_s.
    limit_forward_s: the longest forward pass, in seconds; none means limit_step_s.
    limit_exchange_s: the longest dispatch, experts and combination of a layer in the forward pass, in seconds; none
        means limit_step_s.
    limit_backward_s: the longest backward pass, in seconds; none means limit_step_s.
    """

    nodes: Annotated[int, "[1, 100000]"] = 1
    workers: Annotated[int, "[1, 1e6]"] = 2
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads_per_worker: Annotated[int, "[0, 4096]"] = 0
    cpus_per_worker: Annotated[int, "[1, 4096]"] = 1
    start_timeout_s: Annotated[float, "[0.001, 1e7]"] = 120.0
    stop_grace_s: Annotated[float, "[0.001, 1e7]"] = 60.0
    failure_grace_s: Annotated[float, "[0.001, 1e7]"] = 3.0
    unresponsive_s: Annotated[float, "[0.001, 1e7]"] = 300.0
    capacity_wait_s: Annotated[float, "[0, 1e7]"] = 0.0
    restarts: Annotated[int, "[0, 1000]"] = 3
    backoff_s: Annotated[float, "[0, 1e7]"] = 1.0
    backoff_max_s: Annotated[float, "[0, 1e7]"] = 60.0
    wait_for_nodes_s: Annotated[float, "[0, 1e7]"] = 60.0
    min_workers: Annotated[int, "[1, 1e6]"] = 1
    limit_start_s: Annotated[float, "[0, 1e7]"] = 1800.0
    limit_step_s: Annotated[float, "[0, 1e7]"] = 450.0
    limit_save_s: Annotated[float, "[0, 1e7]"] = 2400.0
    limit_load_s: Annotated[float | None, "[0, 1e7]"] = None
    limit_data_s: Annotated[float | None, "[0, 1e7]"] = None
    limit_forward_s: Annotated[float | None, "[0, 1e7]"] = None
    limit_exchange_s: Annotated[float | None, "[0, 1e7]"] = None
    limit_backward_s: Annotated[float | None, "[0, 1e7]"] = None

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
