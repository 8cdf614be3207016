"""Finds a rank's entry by name, prepares its process, runs it, and turns whatever happens into JSON."""

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext

from cluster.context import EXIT_FAILED, RankContext
from cluster.cores import usable_cores
from cluster.no_terminal import without_terminal
from cluster.process import uncollected
from cluster.redact import redact

Entry = Callable[[RankContext, dict], dict]

# Variables of other launchers. An MPI library that finds them in a process that mpirun did not start aborts, and
# DeepSpeed and torch would take ranks from them.
FOREIGN_PREFIXES = ("PMIX_", "PMI_", "PMI2_", "MPI_", "OMPI_", "PRTE_", "HYDRA_", "SLURM_")
RANK_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
)
THREAD_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def resolve(entry: str) -> Entry:
    """The function that "module:function" names.

    Raises:
        ValueError: the name has another form, or the module has no such function.
        ImportError: the module cannot be imported.
    """
    module_name, colon, function_name = entry.partition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise ValueError(f"entry {entry!r} is not of the form 'package.module:function'")
    with uncollected():
        function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ValueError(f"entry {entry!r}: module {module_name} has no function {function_name!r}")
    return function


def encode(value: object, what: str) -> str:
    """The JSON text of a payload or result.

    Raises:
        TypeError: with the path of the first part that JSON cannot hold.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be a dict that JSON can hold, not {type(value).__name__}")
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        path = _first_unfit(value, what)
        raise TypeError(f"{path}; pass numbers, strings, lists and dicts only") from error


def run_entry(entry: str, payload_text: str, context: RankContext) -> dict:
    """Runs an entry and reports: {"ok", "result"} or {"ok", "error", "kind", "exit_code"}, with "at" in seconds.

    "exception" lists the names of what was raised, its class first, then its base classes.

    SystemExit becomes a failure with its status; KeyboardInterrupt passes through. Launchers other than debug have no
    terminal for a rank: breakpoint() is an error there that says so.
    """
    try:
        alone = nullcontext() if context.launcher == "debug" else without_terminal(context.rank, context.launcher)
        with alone:
            result = resolve(entry)(context, json.loads(payload_text))
        encode(result, f"the result of {entry} on rank {context.rank}")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_FAILED
        text = "" if isinstance(stop.code, int) or stop.code is None else f": {stop.code}"
        return _failed("exited", f"rank {context.rank}: {entry} called sys.exit({code}){text}", code or EXIT_FAILED)
    except Exception as error:  # noqa: BLE001 (whatever the entry raises is this rank's report)
        own_frame = error.__traceback__
        lines = traceback.format_exception(error.with_traceback(own_frame and own_frame.tb_next))
        names = [kind.__name__ for kind in type(error).__mro__[:-2]]  # without BaseException and object
        return _failed("exception", "".join(lines), EXIT_FAILED) | {"exception": names}
    return {"ok": True, "result": result, "at": time.time()}


def prepare_environment(
    environment: MutableMapping[str, str], context: RankContext, threads: int, *, strip: bool = True
) -> None:
    """Sets the variables that torch, DeepSpeed and Gloo look for, and removes those of other launchers.

    Has to happen before torch is imported in that process: OpenMP reads its thread count once.

    Args:
        strip: False inside a process of mpirun, whose own variables are still in use.
    """
    foreign = FOREIGN_PREFIXES if strip else ()
    for name in [n for n in environment if n.startswith(foreign) or n in RANK_NAMES]:
        del environment[name]
    environment["RANK"] = str(context.rank)
    environment["WORLD_SIZE"] = str(context.world_size)
    environment["LOCAL_RANK"] = str(context.local_rank)
    environment["LOCAL_WORLD_SIZE"] = str(context.local_world_size)
    if context.interface:
        environment["GLOO_SOCKET_IFNAME"] = context.interface
    for name in THREAD_NAMES:
        environment[name] = str(threads)


def thread_count(threads_per_worker: int, local_world_size: int, stated: int | None = None) -> int:
    """How many threads each of a node's workers gets.

    Args:
        threads_per_worker: the configuration's number; 0 leaves it to the others.
        local_world_size: workers of this node, which share its usable cores.
        stated: what the user's environment asks for, see `cores.stated_threads`; comes before a share.
    """
    return threads_per_worker or stated or max(1, usable_cores() // local_world_size)


def loopback_interface() -> str:
    """The name of this system's loopback interface, for ranks that are all on one machine."""
    return "lo0" if sys.platform == "darwin" else "lo"


def _failed(kind: str, text: str, exit_code: int) -> dict:
    return {"ok": False, "kind": kind, "error": redact(text), "exit_code": exit_code, "at": time.time()}


def _first_unfit(value: object, path: str) -> str:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int | float | bool | None):
                return f"{path} has the key {key!r} of type {type(key).__name__}, which JSON cannot hold"
            if not _fits(item):
                return _first_unfit(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not _fits(item):
                return _first_unfit(item, f"{path}[{index}]")
    return f"{path} is of type {type(value).__name__}, which JSON cannot hold"


def _fits(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
