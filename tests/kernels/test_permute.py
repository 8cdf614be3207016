"""Sorting rows by expert and adding them up again, against loops; gradients against autograd's index operations."""

import pytest
import torch

from kernels.permute import permutation, permute, sort_by_expert, unpermute


def routing(tokens=7, top_k=3, experts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=generator)


def test_order_is_by_expert_and_stable():
    ids, _ = routing()
    moved = sort_by_expert(ids)
    flat = ids.flatten().tolist()
    assert moved.order.tolist() == sorted(range(len(flat)), key=lambda row: flat[row])
    assert moved.order[moved.inverse].tolist() == list(range(len(flat)))


@pytest.mark.parametrize("top_k", [1, 3])
def test_permute_copies_tokens_and_adds_their_gradients(top_k):
    ids, _ = routing(top_k=top_k)
    moved = sort_by_expert(ids)
    x = torch.randn(7, 4, requires_grad=True)
    rows = permute(x, moved, top_k)
    expected = x[torch.div(moved.order, top_k, rounding_mode="floor")]
    assert torch.equal(rows, expected)
    probe = torch.randn(rows.shape)
    ours, theirs = (torch.autograd.grad(out, x, probe)[0] for out in (rows, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unpermute_is_the_weighted_sum_over_choices(dtype):
    ids, weights = routing()
    moved = sort_by_expert(ids)
    rows = torch.randn(21, 4).to(dtype).requires_grad_()
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out = unpermute(rows, weights, moved)
    assert out.dtype == dtype
    expected = (rows[moved.inverse].view(7, 3, 4).to(weights.dtype) * weights[..., None]).sum(1)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.to(weights.dtype), expected, rtol=tolerance, atol=tolerance)
    probe = torch.randn(7, 4)
    ours = torch.autograd.grad(out, (rows, weights), probe.to(dtype))
    theirs = torch.autograd.grad(expected, (rows, weights), probe.to(dtype).to(weights.dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_there_and_back_is_the_sum_of_weights():
    ids, weights = routing()
    moved = sort_by_expert(ids)
    x = torch.randn(7, 4)
    torch.testing.assert_close(unpermute(permute(x, moved, 3), weights, moved), x * weights.sum(1, keepdim=True))


def test_plain_reordering_and_its_inverse():
    moved = permutation(torch.tensor([2, 0, 1]))
    x = torch.tensor([[10.0], [20.0], [30.0]])
    assert permute(x, moved).flatten().tolist() == [30.0, 10.0, 20.0]
    assert moved.inverse.tolist() == [1, 2, 0]


def test_two_runs_are_equal_to_the_last_bit():
    ids, weights = routing(tokens=200, experts=8)
    moved = sort_by_expert(ids)
    x = torch.randn(200, 16, requires_grad=True)

    def run():
        return torch.autograd.grad(unpermute(permute(x, moved, 3).sin(), weights, moved).square().sum(), x)[0]

    assert torch.equal(run(), run())
