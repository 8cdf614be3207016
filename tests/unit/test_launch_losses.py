"""Losses: shares of ranks and micro-steps add up to the loss of the whole batch."""

import pytest
import torch

from launch.losses import Weights, batch_balance, compute_losses, target_counts, target_masks
from model.routing_stats import stack_layers
from model.transformer import ModelOutput


def output(main: torch.Tensor, deeper: torch.Tensor, balance: float) -> ModelOutput:
    routing = stack_layers([], 1, 2, torch.device("cpu"))._replace(sequence_balance=torch.tensor(balance))
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


def test_the_global_balance_loss_is_one_a_layer_when_even_and_its_shares_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(12, 3, 4, generator=generator)  # 12 tokens, 3 layers, 4 experts
    scores /= scores.sum(-1, keepdim=True)
    counts = torch.tensor([[6, 6, 6, 6], [24, 0, 0, 0], [3, 9, 6, 6]])  # two experts a token
    whole = batch_balance(scores.sum(0), counts, 2)
    shares = [batch_balance(scores[part].sum(0), counts, 2) for part in (slice(0, 5), slice(5, 12))]
    assert float(sum(shares)) == pytest.approx(float(whole), rel=1e-6)
    even, one_takes_all, uneven = (
        float(batch_balance(scores[:, i : i + 1].sum(0), counts[i : i + 1], 2)) for i in range(3)
    )
    assert even == pytest.approx(1.0, rel=1e-6)
    assert one_takes_all == pytest.approx(4 * float(scores[:, 1, 0].mean()), rel=1e-6)
    literal = 4 * sum(counts[2, e].item() / 24 * float(scores[:, 2, e].mean()) for e in range(4))
    assert uneven == pytest.approx(literal, rel=1e-6)
