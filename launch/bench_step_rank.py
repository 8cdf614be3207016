"""One process of `trimtab bench step`: trains one way, natural routing first, then forced-even, and times each step."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.bench_ranks import PeakMemory
from launch.bench_step_ways import WAYS, OurRun, Peer, StepShape, even_choice, import_packages
from launch.feed import open_feed

ROUTINGS = ("natural", "even")
_SEED = 0


def measure(job: dict[str, Any], rank: int, n_ranks: int) -> dict[str, Any]:
    """Trains job["way"]; job: way, shape, data (folder), run (folder for our run), warm_up, steps, profile.

    Returns:
        routings: for each, seconds of the timed steps and the loss of every step, warm-up included; for ours also
        exposed, seconds of each timed step that rank 0 waited for transfers. peak_mib: rise of resident memory from
        before the model was made until the natural steps were done. profile: of ours, where asked for.
    """
    shape = StepShape(**job["shape"])
    way = WAYS[job["way"]]
    ep_size = n_ranks if way.spreads else 1
    each = job["warm_up"] + job["steps"]
    config = shape.config(job["data"], n_ranks, 2 * each, ep_size)
    import_packages(way.packages, rank)
    memory = PeakMemory()
    trained: OurRun | Peer
    trained = OurRun(config, Path(job["run"]), rank) if way.peer is None else way.peer(shape, rank, n_ranks, _SEED)
    feed = None if isinstance(trained, OurRun) else open_feed(config, rank, n_ranks)
    found, peak = [], None
    for place, routing in enumerate(ROUTINGS):
        if routing == "even":
            peak = memory.mib()
            trained.force(even_choice(shape.batch * shape.seq_len, shape.experts, shape.top_k))
        first = place * each
        if isinstance(trained, OurRun):
            steps = list(trained.train(first, first + each))
            losses, seconds = [one["loss"] for one in steps], [one["step_seconds"] for one in steps]
            exposed = [one["exposed_all_to_all_seconds"] for one in steps]
        else:
            assert feed is not None
            losses, seconds, exposed = [], [], []
            for number in range(first, first + each):
                dist.barrier()
                started = time.perf_counter()
                (batch,) = feed.stream.read(number)
                loss = trained.step(batch)
                dist.barrier()
                seconds.append(time.perf_counter() - started)
                dist.all_reduce(loss)
                losses.append(float(loss) / n_ranks)
        found.append({
            "routing": routing, "losses": losses, "seconds": seconds[job["warm_up"] :],
            "exposed": exposed[job["warm_up"] :],
        })  # fmt: skip
    result: dict[str, Any] = {"routings": found, "peak_mib": peak, "profile": None}
    if job["profile"] and isinstance(trained, OurRun):
        result["profile"] = _profile(trained, 2 * each, job["steps"])
    return result


def _profile(trained: OurRun, first: int, steps: int) -> list[dict[str, Any]]:
    """Operations of this rank by the time spent in each itself: name, calls a step, share of all, ms a step.

    Routing is still forced to be even. The profiler makes a step slower and small operations look larger.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        list(trained.train(first, first + steps))
    events = [one for one in profiler.key_averages() if one.self_cpu_time_total > 0]
    total = sum(one.self_cpu_time_total for one in events)
    events.sort(key=lambda one: -one.self_cpu_time_total)
    return [
        {
            "operation": one.key, "calls": one.count / steps, "share": one.self_cpu_time_total / total,
            "ms": one.self_cpu_time_total / 1e3 / steps,
        }
        for one in events[:25]
    ]  # fmt: skip
