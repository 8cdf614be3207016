"""What a rank is told about itself, and what a launcher reports when all ranks have ended."""

import json
from dataclasses import dataclass, field, fields

from cluster.flag import StopFlag

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # stopped on request; what was asked for is saved and can be resumed

STOPPED = "stopped"  # the value of "status" in the result of an entry that ended because of `stop`


@dataclass(frozen=True)
class RankContext:
    """One rank's place in the world; the first argument of every entry.

    init_method is what torch.distributed.init_process_group takes, "" when world_size is 1 and no group is needed.
    generation counts the restarts of a run: processes of different generations never meet.
    stop is set when a graceful stop was asked for; ranks have to agree on the step at which they heed it.
    interface is the network interface for Gloo (already exported as GLOO_SOCKET_IFNAME), None to let Gloo choose.
    device_index is the accelerator to use among those that this process can see, None where not every rank has one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    n_nodes: int
    init_method: str
    generation: int = 0
    launcher: str = "debug"
    stop: StopFlag = field(default_factory=StopFlag, compare=False)
    interface: str | None = None
    device_index: int | None = 0

    def to_json(self) -> str:
        """Everything but the event, which cannot leave its process."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.name != "stop"})

    @classmethod
    def from_json(cls, text: str) -> "RankContext":
        """The context with a new, unset stop event."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class RankFailure:
    """Why one rank did not deliver a result.

    kind: "exception" (the entry raised), "killed" (a signal or a lost actor), "node" (lost with its machine), "exited"
    (the process ended without a result), "start" (never began), "capacity" (no room for the ranks), "hang" (killed by
    its monitor), "timeout" (answered or stopped too late). observed_at: time.time() seconds. exception: the names of
    what was raised, its class first, then its base classes. node: the id of the machine, "" where the launcher knows
    only one.
    """

    rank: int
    kind: str
    message: str
    signal: int | None = None
    exit_code: int = EXIT_FAILED
    observed_at: float = 0.0
    exception: tuple[str, ...] = ()
    node: str = ""


@dataclass(frozen=True)
class LaunchResult:
    """The end of a launch: 0 done, 75 stopped on request, 2 refused before anything ran, 1 anything else.

    results holds each rank's returned object by rank, None where there is none. error is one text for people: the
    first cause. failures lists every rank's own failure, the likely cause first. generation: of the last launch, where
    there were several. reason: a word for why nothing was tried again ("user_error", "poison", "restarts", "capacity",
    "storage"), "" where nothing was to be tried again.
    """

    exit_code: int
    results: list[dict | None]
    error: str = ""
    failures: tuple[RankFailure, ...] = ()
    generation: int = 0
    reason: str = ""
