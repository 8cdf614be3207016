"""The balancer: integers decide, the bias moves once per step, whatever must not count does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.routing_stats import RoutingStats, stack_layers
from parallel.balance import Balancer, BiasMismatchError
from parallel.communicator import SingleCommunicator
from parallel.config import BalanceConfig
from parallel.schedule import balance_rate
from parallel.threads import VirtualWorld, run_virtual_ranks


def routing(counts: list[list[int]], needs: Any = None) -> RoutingStats:
    """Statistics that hold these counts (M, E), and needs (M, E, BINS) where given."""
    rows = torch.tensor(counts)
    stats = stack_layers([], len(counts), rows.shape[1], torch.device("cpu"))._replace(tokens_per_expert=rows)
    return stats if needs is None else stats._replace(bias_histogram=needs)


def test_counts_of_all_micro_steps_and_ranks_move_the_bias_once() -> None:
    def work(world: VirtualWorld, rank: int) -> tuple[list, list]:
        bias = torch.zeros(2)
        balancer = Balancer([bias], BalanceConfig(rate=0.5), world.communicator([0, 1], rank))
        # Rank 0 alone would lower expert 0, rank 1 alone expert 1; together expert 1 has more.
        for _ in range(2):
            balancer.add(routing([[5, 1]] if rank == 0 else [[0, 6]]))
        counts = balancer.step(0)
        return counts.tolist(), bias.tolist()

    assert run_virtual_ranks(2, work) == [([[10, 14]], [0.5, -0.5])] * 2


def test_skipped_steps_and_rule_none_leave_the_bias() -> None:
    bias = torch.zeros(2)
    balancer = Balancer([bias], BalanceConfig(rate=0.5), SingleCommunicator())
    balancer.add(routing([[9, 1]]))
    assert balancer.skip().tolist() == [[9, 1]]
    assert bias.tolist() == [0.0, 0.0]
    assert balancer.step(0).tolist() == [[0, 0]], "a skipped step's counts must be gone"
    for rule in ("none", "aux_loss"):
        still = Balancer([bias], BalanceConfig(rule=rule), SingleCommunicator())  # type: ignore[arg-type]
        still.add(routing([[9, 1]]))
        assert still.step(0).tolist() == [[9, 1]]
        assert bias.tolist() == [0.0, 0.0]


def test_a_dense_model_has_nothing_to_balance() -> None:
    for rule in ("sign", "quantile"):
        balancer = Balancer([], BalanceConfig(rule=rule), SingleCommunicator())  # type: ignore[arg-type]
        assert not balancer.wants_histogram
        assert balancer.step(0).shape == (0, 0)
        assert balancer.bias_table().shape == (0, 0)
        balancer.check()


def test_the_rules_differ_in_how_far_they_move() -> None:
    def moved(**settings: Any) -> list[float]:
        bias = torch.tensor([1.0, 1.0])
        balancer = Balancer([bias], BalanceConfig(**settings), SingleCommunicator())
        balancer.add(routing([[30, 10]]))
        balancer.step(0)
        return bias.tolist()

    assert moved(rule="sign", rate=0.25) == [0.75, 1.25]
    assert moved(rule="proportional", rate=0.25) == [0.875, 1.125]
    assert moved(rule="proportional", rate=0.25, recentre=True) == [-0.125, 0.125]


def test_the_rate_rises_holds_and_falls() -> None:
    def rates(config: BalanceConfig, *steps: int) -> list[float]:
        return [balance_rate(config, step) for step in steps]

    base = BalanceConfig(rate=0.1, rate_warmup_steps=4)
    assert rates(base, 0, 1, 3, 4, 10**6) == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])
    dropped = replace(base, rate_schedule="step", rate_zero_at=20)
    assert rates(dropped, 19, 20, 21) == [0.1, 0.0, 0.0]
    linear = replace(base, rate_schedule="linear", rate_anneal_from=10, rate_zero_at=20)
    assert rates(linear, 9, 10, 15, 19, 20, 99) == pytest.approx([0.1, 0.1, 0.05, 0.01, 0.0, 0.0])
    cosine = replace(linear, rate_schedule="cosine")
    assert rates(cosine, 9, 10, 15, 20) == pytest.approx([0.1, 0.1, 0.05, 0.0])


def test_a_rate_at_zero_freezes_the_bias() -> None:
    bias = torch.tensor([0.3, -0.1])
    config = BalanceConfig(rate=0.1, rate_schedule="step", rate_zero_at=5, recentre=True)
    balancer = Balancer([bias], config, SingleCommunicator())
    balancer.add(routing([[9, 1]]))
    balancer.step(5)
    assert torch.equal(bias, torch.tensor([0.3, -0.1]))


def test_a_raised_rate_lasts_its_steps_and_survives_a_checkpoint() -> None:
    config = BalanceConfig(rate=0.5, raise_rate_factor=4.0, raise_rate_steps=3)
    balancer = Balancer([torch.zeros(2)], config, SingleCommunicator())
    balancer.raise_rate(10)
    assert [balancer.rate(step) for step in (10, 12, 13)] == [2.0, 2.0, 0.5]
    resumed = Balancer([torch.zeros(2)], config, SingleCommunicator())
    resumed.load_state(balancer.state())
    assert [resumed.rate(step) for step in (12, 13)] == [2.0, 0.5]
    resumed.load_state({})
    assert resumed.rate(12) == 0.5


def test_ranks_with_another_bias_are_named() -> None:
    def work(world: VirtualWorld, rank: int) -> str:
        bias = torch.tensor([0.1, 0.2])
        balancer = Balancer([bias], BalanceConfig(), world.communicator([0, 1, 2], rank))
        balancer.check()
        if rank == 1:
            bias[0] = bias[0].nextafter(torch.tensor(1.0))  # one unit in the last place
        with pytest.raises(BiasMismatchError, match=r"ranks \[1\] differs from that of the 2 other ranks") as error:
            balancer.check()
        return str(error.value)

    assert len(set(run_virtual_ranks(3, work))) == 1


def test_where_no_bias_is_that_of_most_all_ranks_are_named() -> None:
    def work(world: VirtualWorld, rank: int) -> None:
        balancer = Balancer(
            [torch.full((2,), float(rank % 2))], BalanceConfig(), world.communicator([0, 1, 2, 3], rank)
        )
        with pytest.raises(BiasMismatchError, match=r"^ranks \[0, 2\] and \[1, 3\] hold different routing biases"):
            balancer.check()

    run_virtual_ranks(4, work)


BAD = {
    "balance.rate = 2.0 is a fraction": {"rule": "quantile", "rate": 2.0},
    "balance.rate_zero_at = 0 must come after": {"rate_schedule": "linear"},
    "balance.rate_anneal_from = 3 lies inside the warm-up": {
        "rate_schedule": "cosine", "rate_anneal_from": 3, "rate_warmup_steps": 5, "rate_zero_at": 9,
    },
    "balance.rate_zero_at = 9 means nothing under rate_schedule constant": {"rate_zero_at": 9},
    'balance.on_max_vio = "raise_rate" has no rate to raise under rule quantile': {
        "rule": "quantile", "on_max_vio": "raise_rate",
    },
    "balance.aux_loss_coef = -1.0 must not be negative": {"aux_loss_coef": -1.0},
    "balance.raise_rate_factor = 0.5 must be at least 1": {"raise_rate_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_impossible_settings_are_refused(message: str) -> None:
    (problem,) = BalanceConfig(**BAD[message]).problems()
    assert problem.startswith(message)
    assert not BalanceConfig().problems()
