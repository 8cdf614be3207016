"""Arithmetic of `trimtab bench scaling`: where a step's time went, what efficiency was lost to, the network's fit."""

# S measured steps, N ranks

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COMPUTE, OPTIMIZER, ZERO, ALL_TO_ALL, WAITING, DATA, REST = PARTS = (
    "compute", "optimizer", "ZeRO", "all-to-all", "waiting", "data", "rest"
)  # fmt: skip
# Of a rank's step: seconds; and of KINDS the seconds of each call, in order.
FIELDS = ("data", "model", "zero_in_model", "update", "zero_in_update", "all_to_all", "other")
KINDS = EXCHANGE, SHARDING, OUTSIDE = ("all_to_all", "zero", "other")
LOSS_TOLERANCE = 1e-5  # relative, of any step's loss


@dataclass(frozen=True)
class Measured:
    """One run after its warm-up.

    ranks: N. tokens: of a step, over all ranks. seconds: of a step, mean. parts: seconds of a step by PARTS, which add
    up to `seconds`. losses: of every step, warm-up included.
    """

    name: str
    ranks: int
    tokens: float
    seconds: float
    parts: Mapping[str, float]
    losses: tuple[float, ...]
    mib_sent: float

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """Rank-seconds that a token takes."""
        return self.ranks * self.seconds / self.tokens


def measured(result: Mapping[str, Any], warm_up: int) -> Measured:
    """What a run's result (see `launch.bench_scaling_worker`) says about the steps after the first `warm_up`.

    Raises:
        ValueError: metrics and ranks do not have the same steps.
    """
    metrics, ranks = result["metrics"], result["ranks"]
    if {len(metrics)} != {len(steps) for steps in ranks} or len(metrics) <= warm_up:
        counts = [len(steps) for steps in ranks]
        raise ValueError(f"{result['name']}: {len(metrics)} steps in the metrics, {counts} on the ranks")
    kept = metrics[warm_up:]
    seconds = [step["step_seconds"] for step in kept]
    parts = split_step(seconds, [steps[warm_up:] for steps in ranks], result["ep_size"])
    tokens = (metrics[-1]["tokens"] - metrics[warm_up - 1]["tokens"]) / len(kept)
    sent = float(np.mean([step["bytes_sent"] for step in kept])) / len(ranks) / 2**20
    losses = tuple(step["loss"] for step in metrics)
    return Measured(result["name"], len(ranks), tokens, float(np.mean(seconds)), parts, losses, sent)


def split_step(
    step_seconds: Sequence[float], ranks: Sequence[Sequence[Mapping[str, Any]]], ep_size: int
) -> dict[str, float]:
    """Where a step's seconds went, as a mean over S steps and N ranks; the parts add up to the mean step.

    A call's time on a rank is its price and the wait for the last rank to come. The rank that spent least in a call
    came last, so what it spent is the price, and what the others spent beyond it is waiting. `waiting_seconds` of
    metrics.jsonl compares whole steps, which misses ranks that wait for each other in turns, layer by layer.

    Args:
        step_seconds: (S,) from the run's metrics.
        ranks: (N, S), each with the seconds of FIELDS: `data` waiting for batches; `model` forward and backward, of
            which `all_to_all` standing still for expert exchanges and `zero_in_model` in other collectives; `update`
            the optimizer's step, of which `zero_in_update` in collectives; `other` in collectives outside of all these;
            and `calls`, the seconds of each call by KINDS.
        ep_size: neighbouring ranks that exchange with each other; the other collectives are taken to be of all ranks.

    Returns:
        Seconds by PARTS. `rest` is what remains of the step: the price of the collectives outside, statistics,
        balancing, telemetry, Python between the timers.
    """
    table = {name: np.array([[step[name] for step in steps] for steps in ranks]).T for name in FIELDS}  # (S, N)
    zero = table["zero_in_model"] + table["zero_in_update"]
    spent = {EXCHANGE: table["all_to_all"], SHARDING: zero, OUTSIDE: table["other"]}
    price = {kind: _price(ranks, kind, ep_size if kind == EXCHANGE else len(ranks)) for kind in KINDS}
    parts = {
        COMPUTE: float((table["model"] - table["all_to_all"] - table["zero_in_model"]).mean()),
        OPTIMIZER: float((table["update"] - table["zero_in_update"]).mean()),
        ZERO: price[SHARDING],
        ALL_TO_ALL: price[EXCHANGE],
        WAITING: sum(float(spent[kind].mean()) - price[kind] for kind in KINDS),
        DATA: float(table["data"].mean()),
    }
    parts[REST] = float(np.mean(step_seconds)) - sum(parts.values())
    return parts


def _price(ranks: Sequence[Sequence[Mapping[str, Any]]], kind: str, group: int) -> float:
    """Seconds of a step's calls on the rank of each group that came last, call by call; mean over steps and groups."""
    total = 0.0
    for first in range(0, len(ranks), group):
        for steps in zip(*ranks[first : first + group], strict=True):
            calls = [step["calls"][kind] for step in steps]
            if len({len(one) for one in calls}) > 1:
                raise ValueError(f"ranks {first} to {first + group - 1} made different numbers of {kind} calls")
            total += sum(min(call) for call in zip(*calls, strict=True))
    return total * group / len(ranks) / len(ranks[0])


def efficiency(here: Measured, base: Measured) -> float:
    """Tokens per rank-second, as a fraction of the base's."""
    return base.cost / here.cost


def lost_to(here: Measured, base: Measured) -> dict[str, float]:
    """What the efficiency was lost to: fractions by PARTS that add up to 1 - efficiency.

    A part's loss is the rank-seconds a token that it takes beyond what it took in the base, over all rank-seconds a
    token. Negative where a part has become cheaper.
    """
    return {
        name: (here.ranks * here.parts[name] / here.tokens - base.ranks * base.parts[name] / base.tokens) / here.cost
        for name in PARTS
    }


def loss_difference(here: Sequence[float], base: Sequence[float]) -> float:
    """The largest difference of two runs' losses in any step, relative to the base's; NaN is infinitely far."""
    if len(here) != len(base):
        raise ValueError(f"{len(here)} and {len(base)} steps cannot be compared")
    one, other = np.array(here), np.array(base)
    difference = np.abs(one - other) / np.abs(other)
    return float(np.where(np.isfinite(difference), difference, np.inf).max())


@dataclass(frozen=True)
class Fit:
    """seconds = latency_s + nbytes * seconds_per_byte; residuals: (measured - fitted) / measured of each size."""

    latency_s: float
    seconds_per_byte: float
    residuals: tuple[float, ...]

    @property
    def gigabytes_per_second(self) -> float:
        """What the slope says of bandwidth; infinite where time does not grow with size."""
        return 1e-9 / self.seconds_per_byte if self.seconds_per_byte > 0 else float("inf")


def fit_network(nbytes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Alpha and beta of the network by least squares on relative errors, so that every size counts alike.

    Args:
        nbytes: at least two different sizes, what a rank sends to all others in one call.
        seconds: of each size, more than zero.

    Source: R. W. Hockney, "The communication challenge for MPP" (Parallel Computing 20, 1994).
    """
    if len(set(nbytes)) < 2:
        raise ValueError("a latency and a bandwidth need at least two sizes")
    sizes, took = np.array(nbytes, float), np.array(seconds)
    largest = sizes.max()  # keeps the two columns of one magnitude
    columns = np.stack([1.0 / took, sizes / largest / took], axis=1)
    alpha, slope = np.linalg.lstsq(columns, np.ones(len(took)), rcond=None)[0]
    beta = slope / largest
    residuals = (took - (alpha + beta * sizes)) / took
    return Fit(float(alpha), float(beta), tuple(float(one) for one in residuals))
