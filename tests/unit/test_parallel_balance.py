"""The balancer: integers decide, the bias moves once per step, whatever must not count does not."""

import torch

from parallel.balance import Balancer, sign_rule
from parallel.communicator import SingleCommunicator
from parallel.config import BalanceConfig
from parallel.threads import VirtualWorld, run_virtual_ranks


def test_sign_rule_against_the_paper() -> None:
    counts = torch.tensor([[10, 20, 30], [7, 7, 7]])
    moved = sign_rule(counts, torch.zeros(2, 3), 0.001)
    assert torch.equal(moved, torch.tensor([[0.001, 0.0, -0.001], [0.0, 0.0, 0.0]]))


def test_one_token_decides_among_millions() -> None:
    """A mean in bf16, or counts in bf16, would see no difference here, or one of the wrong sign."""
    counts = torch.tensor([100_000_001, 100_000_000, 99_999_999, 100_000_000])
    moved = sign_rule(counts, torch.zeros(4), 1.0)
    assert moved.tolist() == [-1.0, 0.0, 1.0, 0.0]
    rounded = counts.to(torch.bfloat16).to(torch.int64)
    assert sign_rule(rounded, torch.zeros(4), 1.0).tolist() != moved.tolist()


def test_the_mean_need_not_be_an_integer() -> None:
    assert sign_rule(torch.tensor([1, 1, 2]), torch.zeros(3), 1.0).tolist() == [1.0, 1.0, -1.0]


def test_counts_of_all_micro_steps_and_ranks_move_the_bias_once() -> None:
    def work(world: VirtualWorld, rank: int) -> tuple[list, list]:
        bias = torch.zeros(2)
        balancer = Balancer([bias], BalanceConfig(rate=0.5), world.communicator([0, 1], rank))
        # Rank 0 alone would lower expert 0, rank 1 alone expert 1; together expert 1 has more.
        for _ in range(2):
            balancer.add(torch.tensor([[5, 1]] if rank == 0 else [[0, 6]]))
        counts = balancer.step()
        return counts.tolist(), bias.tolist()

    assert run_virtual_ranks(2, work) == [([[10, 14]], [0.5, -0.5])] * 2


def test_skipped_steps_and_rule_none_leave_the_bias() -> None:
    bias = torch.zeros(2)
    balancer = Balancer([bias], BalanceConfig(rate=0.5), SingleCommunicator())
    balancer.add(torch.tensor([[9, 1]]))
    assert balancer.skip().tolist() == [[9, 1]]
    assert bias.tolist() == [0.0, 0.0]
    assert balancer.step().tolist() == [[0, 0]], "a skipped step's counts must be gone"
    still = Balancer([bias], BalanceConfig(rule="none"), SingleCommunicator())
    still.add(torch.tensor([[9, 1]]))
    assert still.step().tolist() == [[9, 1]]
    assert bias.tolist() == [0.0, 0.0]


def test_a_dense_model_has_nothing_to_balance() -> None:
    balancer = Balancer([], BalanceConfig(), SingleCommunicator())
    assert balancer.step().shape == (0, 0)
    assert balancer.bias_table().shape == (0, 0)
