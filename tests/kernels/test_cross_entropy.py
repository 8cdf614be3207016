"""Cross-entropy of a linear head in blocks against torch's own on whole logits, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels.cross_entropy
from kernels.cross_entropy import linear_cross_entropy


def case(dtype=torch.float32, tokens=13, hidden=6, vocab=11):
    torch.manual_seed(0)
    x = (torch.randn(tokens, hidden) * 2).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("keep_bytes", [0, 13 * 5 * 4, 2**20], ids=["none kept", "a block kept", "all kept"])
@pytest.mark.parametrize("words", [1, 5, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, words, keep_bytes, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK_BYTES", {"cpu": words * 13 * 4})
    monkeypatch.setattr(kernels.cross_entropy, "LEAST_WORDS", 1)
    x, weight, targets = case(dtype)
    losses = linear_cross_entropy(x, weight, targets, keep_bytes)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    probe = torch.randn(13)  # every token's own weight, zero and negative ones too
    probe[3] = 0.0
    theirs = torch.autograd.grad(expected, exact, probe.double())
    for _ in range(2):  # a second backward over the same graph finds what it needs untouched
        ours = torch.autograd.grad(losses, (x, weight), probe, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_large_logits_do_not_overflow():
    x, weight, targets = case()
    losses = linear_cross_entropy(x * 1000, weight, targets)
    expected = F.cross_entropy(x * 1000 @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-2)
    losses.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_no_token():
    _, weight, _ = case()
    losses = linear_cross_entropy(torch.zeros(0, 6, requires_grad=True), weight, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert weight.grad.abs().max() == 0


def test_autocast():
    x, weight, targets = case()
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(x, weight, targets)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert weight.grad.dtype == torch.float32


def test_gradcheck_in_fp64(monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr(kernels.cross_entropy, "LEAST_WORDS", 4)
    x, weight, targets = case(torch.float64)
    for keep_bytes in (0, 2**20):
        assert torch.autograd.gradcheck(
            lambda x, w, kept=keep_bytes: linear_cross_entropy(x, w, targets, kept), (x, weight)
        )


@pytest.mark.parametrize("tokens", [1, 13, 5000])
def test_blocks_cover_the_vocabulary_and_their_size_is_bounded(tokens):
    hidden, weight = torch.empty(tokens, 4), torch.empty(129_280, 4)
    blocks = list(kernels.cross_entropy._blocks(hidden, weight, torch.float32))
    assert blocks[0].start == 0
    assert blocks[-1].stop == 129_280
    assert all(one.stop == other.start for one, other in itertools.pairwise(blocks))
    widest = max(block.stop - block.start for block in blocks)
    least = kernels.cross_entropy.LEAST_WORDS
    assert widest <= max(least, kernels.cross_entropy.BLOCK_BYTES["cpu"] // (4 * tokens)) + 63


@pytest.mark.parametrize("keep_bytes", [0, 13 * 5 * 4 * 2])
def test_what_is_kept_for_the_backward_is_bounded(keep_bytes, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK_BYTES", {"cpu": 13 * 4 * 4})
    monkeypatch.setattr(kernels.cross_entropy, "LEAST_WORDS", 1)
    x, weight, targets = case()
    losses = linear_cross_entropy(x, weight, targets, keep_bytes)
    kept = [tensor for tensor in losses.grad_fn.saved_tensors if tensor.shape[0] == 13 and tensor.dim() == 2]
    logits = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr()]
    assert sum(tensor.numel() * 4 for tensor in logits) <= keep_bytes
    assert bool(logits) == bool(keep_bytes)
