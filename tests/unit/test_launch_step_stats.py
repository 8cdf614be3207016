"""What a step adds up: over micro-steps, then over ranks; time lost waiting, bytes on the wire."""

import pytest
import torch

from launch.losses import Losses
from launch.step_stats import GlobalStats, StepStats
from model.routing_stats import RoutingStats, stack_layers
from parallel.communicator import SingleCommunicator, Traffic
from parallel.threads import run_virtual_ranks


def losses(*sums: float) -> Losses:
    """Sums by depth, then the two balance sums."""
    return Losses(torch.zeros(()), torch.tensor(sums, dtype=torch.float64))


def routing(changed: list[int], entropy: list[float], pairs: list | None = None) -> RoutingStats:
    """Statistics of a micro-step with two layers of three experts."""
    stats = stack_layers([], 2, 3, torch.device("cpu"))
    stats = stats._replace(changed_by_bias=torch.tensor(changed), gate_entropy=torch.tensor(entropy))
    return stats if pairs is None else stats._replace(coactivation=torch.tensor(pairs))


def reduced(rank_seconds: list[float], rank_bytes: list[int], pairs: bool = False) -> list[GlobalStats]:
    """Every virtual rank's view of a step of two micro-steps, the second rank's losses ten times the first's."""

    def work(world, rank: int) -> GlobalStats:
        stats = StepStats()
        table = [[[rank, 1, 0]] * 3] * 2 if pairs else None
        for micro in (1, 2):
            scale = micro * 10**rank
            stats.add(losses(1.0 * scale, 0.5 * scale, 2.0, 3.0), routing([rank, micro], [0.25, scale], table))
        ranks = world.communicator(list(range(len(rank_seconds))), rank)
        return stats.reduce(ranks, Traffic(9.0, rank_seconds[rank], rank_bytes[rank]))

    return run_virtual_ranks(len(rank_seconds), work)


def test_sums_are_of_all_micro_steps_and_ranks() -> None:
    first, second = reduced([0.1, 0.1], [5, 7])
    for stats in (first, second):
        assert stats.losses == [33.0, 16.5]
        assert (stats.sequence_balance, stats.batch_balance) == (8.0, 12.0)
        assert stats.changed_by_bias.tolist() == [2, 6]
        assert stats.changed_by_bias.dtype == torch.int64
        assert stats.gate_entropy.tolist() == [1.0, 33.0]
        assert stats.gate_entropy.dtype == torch.float64
        assert stats.coactivation is None
        assert stats.bytes_sent == 12


def test_waiting_is_beyond_the_rank_that_came_last() -> None:
    """The last to arrive waits for nobody: what it spends is the transfer's own time."""
    by_rank = reduced([0.5, 0.2, 1.1, 0.2], [0, 0, 0, 0])
    assert [stats.all_to_all_seconds for stats in by_rank] == [9.0] * 4
    assert [stats.exposed_all_to_all_seconds for stats in by_rank] == [0.5, 0.2, 1.1, 0.2]
    for stats in by_rank:
        assert stats.waiting_seconds == pytest.approx((0.3 + 0.0 + 0.9 + 0.0) / 4)
    assert reduced([0.4, 0.4], [0, 0])[0].waiting_seconds == 0.0


def test_one_rank_never_waits() -> None:
    stats = StepStats()
    stats.add(losses(1.0, 0.0, 0.0), routing([0, 0], [0.0, 0.0]))
    found = stats.reduce(SingleCommunicator(), Traffic(0.9, 0.7, 0))
    assert (found.waiting_seconds, found.bytes_sent, found.losses) == (0.0, 0, [1.0])


def test_pairs_are_added_up_where_they_were_collected() -> None:
    for stats in reduced([0.0, 0.0], [0, 0], pairs=True):
        assert stats.coactivation is not None
        assert stats.coactivation.dtype == torch.int64
        assert stats.coactivation.tolist() == [[[2, 4, 0]] * 3] * 2


def test_a_loss_that_is_not_a_number_spoils_no_other_figure() -> None:
    """Everything travels in one tensor: a step that is going to be skipped is still recorded."""
    stats = StepStats()
    stats.add(losses(float("nan"), 1.0, 2.0), routing([4, 5], [1.0, 1.0]))
    found = stats.reduce(SingleCommunicator(), Traffic(0.0, 0.0, 9))
    assert found.losses[0] != found.losses[0]
    assert (found.changed_by_bias.tolist(), found.bytes_sent, found.batch_balance) == ([4, 5], 9, 2.0)


def test_micro_steps_do_not_change_what_was_handed_in() -> None:
    stats, first = StepStats(), routing([1, 1], [1.0, 1.0], [[[1, 0, 0]] * 3] * 2)
    sums = losses(1.0, 0.0, 0.0)
    for _ in range(3):
        stats.add(sums, first)
    stats.reduce(SingleCommunicator(), Traffic())
    assert first.changed_by_bias.tolist() == [1, 1]
    assert first.coactivation.sum() == 6
    assert sums.sums.tolist() == [1.0, 0.0, 0.0]
