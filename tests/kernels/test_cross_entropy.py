"""Cross-entropy of a linear head in chunks against torch's own on whole logits, in fp64."""

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


@pytest.mark.parametrize("keep_bytes", [0, 2**20], ids=["logits computed again", "logits kept"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, chunk_rows, keep_bytes, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_BYTES", {"cpu": chunk_rows * 11 * 4})
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
