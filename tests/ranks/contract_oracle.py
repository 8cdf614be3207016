"""What the exactness contract of balance demands of a run: a literal oracle, equality with one rank, exact counts."""

# T tokens, E routed experts, K top-k, M MoE layers (prediction modules included)

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.stream import MicroBatch
from launch.feed import open_feed
from model.config import ModelConfig
from model.routing_stats import stack_layers
from parallel.balance import Balancer
from parallel.config import BalanceConfig
from parallel.threads import run_virtual_ranks
from tests.ranks.contract import ALONE, Layout, Scenario, Script, Step, pad, play


def global_batches(scenario: Scenario, data: Path) -> list[MicroBatch]:
    """Every step's sequences, read by one rank."""
    steps = scenario.segments[-1][1]
    feed = open_feed(scenario.config(data, ALONE, steps), 0, 1)
    try:
        batches = [feed.stream.read(step)[0] for step in range(steps)]
        return list(map(pad, batches)) if scenario.padded else batches
    finally:
        feed.close()


def working(batch: MicroBatch, depth: int) -> np.ndarray:
    """(B * (S - depth),) bool: real tokens whose token `depth` places ahead is real and of the same document."""
    n_sequences, length = batch.tokens.shape
    real, documents = batch.real.tolist(), batch.doc_ids.tolist()
    return np.array(
        [
            real[b][t] and real[b][t + depth] and documents[b][t] == documents[b][t + depth]
            for b in range(n_sequences)
            for t in range(length - depth)
        ]
    )


def choices(biased: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Which experts each token chooses, by sorting: (T, E) -> (T, E) bool."""
    best_first = np.argsort(-biased, axis=1, kind="stable")
    if not config.limits_groups:
        chosen = best_first[:, : config.num_experts_per_tok]
    else:
        size = config.n_routed_experts // config.n_group
        two_best = np.sort(biased.reshape(-1, config.n_group, size), axis=2)[:, :, -2:].sum(2)
        kept = np.argsort(-two_best, axis=1, kind="stable")[:, : config.topk_group]
        inside = [[e for e in row if e // size in groups] for row, groups in zip(best_first, kept, strict=True)]
        chosen = np.array([row[: config.num_experts_per_tok] for row in inside])
    found = np.zeros(biased.shape, dtype=bool)
    np.put_along_axis(found, chosen, True, axis=1)
    return found


def schedule(balance: BalanceConfig, kept_steps: int) -> float:
    """The rate after so many steps that were not skipped."""
    full = {"sign": 1e-3, "proportional": 1e-2, "quantile": 1.0}.get(balance.rule, 0.0)
    full = full if balance.rate is None else balance.rate
    if kept_steps < balance.rate_warmup_steps:
        return full * (kept_steps + 1) / balance.rate_warmup_steps
    start, end = balance.rate_anneal_from, balance.rate_zero_at
    if balance.rate_schedule == "constant":
        return full
    if kept_steps >= end:
        return 0.0
    done = (kept_steps - start) / (end - start)
    if balance.rate_schedule == "step" or done < 0:
        return full
    return full * (1 - done) if balance.rate_schedule == "linear" else full * 0.5 * (1 + math.cos(math.pi * done))


class RaisedRate:
    """When the alarm on max_vio raises the rate, told from the counts of kept steps."""

    def __init__(self, balance: BalanceConfig) -> None:
        self.balance = balance
        self.above: dict[int, int] = {}  # steps in a row, by layer
        self.until = 0

    def factor(self, kept_steps: int) -> float:
        return self.balance.raise_rate_factor if kept_steps < self.until else 1.0

    def see(self, counts: np.ndarray, kept_steps: int) -> None:
        if not self.balance.alarm_max_vio:
            return
        for layer, loads in enumerate(counts):
            excess = loads.max() / loads.mean() - 1 > self.balance.alarm_max_vio
            self.above[layer] = self.above.get(layer, 0) + 1 if excess else 0
            if self.above[layer] == self.balance.alarm_patience_steps:  # once, until it has ended
                self.until = kept_steps + self.balance.raise_rate_steps


def expected_bias(
    balance: BalanceConfig, rate: float, bias: np.ndarray, counts: np.ndarray, needs: list[np.ndarray] | None
) -> tuple[np.ndarray, float]:
    """The bias (M, E) fp32 after a kept step, and how far off a true one may be."""
    if balance.rule in ("none", "aux_loss") or rate == 0:
        return bias, 0.0
    experts, total = counts.shape[1], counts.sum(1, keepdims=True)
    tolerance = 0.0
    if balance.rule == "sign":
        moved = bias + np.float32(rate) * np.sign(total - experts * counts).astype(np.float32)
    elif balance.rule == "proportional":
        moved = bias + (rate * ((total - experts * counts) / total)).astype(np.float32)
    else:
        assert needs is not None
        wanted = np.ceil(total[:, 0] / experts).astype(int)
        move = np.array([np.sort(rows, axis=0)[n - 1] for rows, n in zip(needs, wanted, strict=True)])
        moved = bias + (rate * move).astype(np.float32)
        tolerance = 0.01 * rate  # the bins' width where these moves lie
    if balance.recentre:
        moved = (moved.astype(np.float64) - moved.astype(np.float64).mean(1, keepdims=True)).astype(np.float32)
        tolerance += 1e-7
    return moved.astype(np.float32), tolerance


def check_steps(scenario: Scenario, data: Path, steps: list[Step]) -> None:
    """Compares a scripted run with the literal reading of the papers, step by step, each from the bias before it."""
    config = scenario.config(data, ALONE, 1).model
    script, balance = Script(config), scenario.balance
    bias = np.zeros((len(config.moe_layers), config.n_routed_experts), dtype=np.float32)
    kept, raised = 0, RaisedRate(balance)
    assert [step.step for step in steps] == list(range(scenario.segments[-1][1]))
    for step, batch in zip(steps, global_batches(scenario, data), strict=True):
        counts, needs = [], []
        for row in range(len(config.moe_layers)):
            depth = max(0, row - config.num_hidden_layers + 1)
            scores = script.scores(row, script.features(row, batch.tokens[:, depth:]).flatten(0, 1)).numpy()
            scores = scores[working(batch, depth)]
            biased = scores + bias[row]
            counts.append(choices(biased, config).sum(0))
            ends = np.sort(biased, axis=1)[:, -config.num_experts_per_tok - 1 :][:, :2].mean(1, keepdims=True)
            needs.append(ends - biased)
        assert step.counts == np.array(counts).tolist(), f"counts of step {step.step} are not those of the tokens"
        found = np.array(step.bias, dtype=np.float32)
        if step.step in scenario.skips:
            assert (found == bias).all(), f"the bias moved in step {step.step}, which was skipped"
            continue
        rate = schedule(balance, kept) * raised.factor(kept)
        assert step.rate == rate, f"the rate of step {step.step} is {step.rate} and not {rate}"
        expected, tolerance = expected_bias(balance, rate, bias, np.array(counts), needs)
        if balance.rule != "quantile" or not scenario.grouped:  # groups have needs of their own; see the unit tests
            off = np.abs(found - expected).max()
            assert off <= tolerance, f"the bias after step {step.step} is {off:.3g} away from the rule's"
        kept += 1
        raised.see(np.array(counts), kept)
        bias = found


def check_same(found: list[Step], reference: list[Step], scenario: Scenario) -> None:
    """Counts, biases and rates bit for bit; losses and gradient norms within rounding.

    A scripted recomputation sees other scores on purpose, and its gradients are those of other weights.
    """
    where = f"{scenario.segments}"
    recomputed = scenario.scripted and any(layout.recompute for layout, _ in scenario.segments)
    keys = [("loss", 1e-6)] if recomputed else [("loss", 1e-6), ("norm", 1e-4)]
    for mine, other in zip(found, reference, strict=True):
        for key in ("step", "counts", "rate", "bias"):
            assert getattr(mine, key) == getattr(other, key), f"{key} of step {mine.step}, {where}"
        if not math.isnan(other.loss):
            for key, tolerance in keys:
                value, expected = getattr(mine, key), getattr(other, key)
                assert math.isclose(value, expected, rel_tol=tolerance), f"{key} of step {mine.step}, {where}"


def check_large_counts() -> None:
    """One choice among a hundred million decides, however it was added up: no float but fp64 could hold the counts."""

    def work(world: Any, rank: int) -> list:
        bias = torch.zeros(4)
        balancer = Balancer([bias], BalanceConfig(rate=0.5), world.communicator([0, 1], rank))
        empty = stack_layers([], 1, 4, torch.device("cpu"))
        for part in ([[50_000_000, 1, 50_000_000, 7]], [[rank, 49_999_999, 1 - rank, 49_999_993]]):
            balancer.add(empty._replace(tokens_per_expert=torch.tensor(part)))
        return [balancer.step(0).tolist(), bias.tolist()]

    expected = [[[100_000_001, 100_000_000, 100_000_001, 100_000_000]], [-0.5, 0.5, -0.5, 0.5]]
    assert run_virtual_ranks(2, work) == [expected, expected], "large counts are not exact"


# A fixed selection, for copies of the code in which a mistake was made.

TRICKY = Scenario(
    BalanceConfig(
        rate=0.01, rate_warmup_steps=3, check_every_steps=2, alarm_max_vio=0.3, on_max_vio="raise_rate",
        alarm_patience_steps=2, raise_rate_factor=3.0, raise_rate_steps=2,
    ),
    segments=((Layout(2, 2, 2, recompute=True), 4), (Layout(2, 1, 4), 7)),
    skips=frozenset({1}),
    mtp=0,
)  # fmt: skip
FIXED = {
    "a scripted run": TRICKY,
    "evaluation and generation": replace(TRICKY, segments=((ALONE, 3),), interludes=frozenset({1})),
    "quantile": Scenario(
        BalanceConfig(rule="quantile", rate=0.5),
        ((Layout(2, 2, 2, recompute=True), 3),),
        skips=frozenset({1}),
        padded=True,
    ),
    "proportional": Scenario(BalanceConfig(rule="proportional", rate=0.05), ((Layout(2, 1, 2), 2),), grouped=True),
    "aux_loss": Scenario(BalanceConfig(rule="aux_loss", aux_loss_coef=0.5), ((Layout(2, 1, 2), 2),)),
}


def check_contract(data: Path, folder: Path) -> None:
    """The fixed selection. Raises: AssertionError naming what was broken, or whatever the broken code raises."""
    for name, scenario in FIXED.items():
        steps = play(scenario, data, folder / name)
        check_steps(scenario, data, steps)
        check_same(steps, play(scenario.alone(), data, folder / f"{name}, alone"), scenario)
    check_large_counts()
