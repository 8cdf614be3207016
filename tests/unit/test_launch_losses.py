"""Losses: shares of ranks and micro-steps add up to the loss of the whole batch."""

import pytest
import torch

from launch.losses import Weights, compute_losses, target_counts, target_masks
from model.transformer import ModelOutput, RoutingStats


def output(main: torch.Tensor, deeper: torch.Tensor, balance: float) -> ModelOutput:
    routing = RoutingStats(torch.zeros(1, 2), torch.tensor(balance), torch.zeros(1))
    return ModelOutput(None, main, (deeper,), routing)


def test_masks_of_deeper_targets_shift_and_end_early() -> None:
    mask = torch.tensor([[True, True, False, True]])
    assert [one.tolist() for one in target_masks(mask, 2)] == [
        [[True, True, False, True]],
        [[True, False, True, False]],
        [[False, True, False, False]],
    ]
    assert target_counts([mask, mask], 1).tolist() == [6, 4]


def test_shares_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    main, deeper = torch.rand(6, 5, generator=generator), torch.rand(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) > 0.3
    counts = target_counts([mask], 1).tolist()
    weights = Weights(mtp=0.3, sequence_balance=0.01)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    shares = [
        compute_losses(output(main[p], deeper[p], len(main[p]) * 2.0), mask[p], counts, 6, weights) for p in parts
    ]
    deep_mask = target_masks(mask, 1)[1]
    expected = main[mask].mean() + 0.3 * deeper[deep_mask].mean() + 0.01 * 2.0
    assert float(sum(share.total for share in shares)) == pytest.approx(float(expected), rel=1e-5)
    sums = sum(share.sums for share in shares)
    assert float(sums[0]) == pytest.approx(float(main[mask].double().sum()), rel=1e-6)
    assert float(sums[2]) == pytest.approx(12.0)
