"""The grouped product against one product for each expert, values and gradients."""

import pytest
import torch

from kernels.grouped_mm import grouped_linear

CASES = {
    "even": (4, 4, 4),
    "skewed": (1, 9, 2),
    "an empty expert": (5, 0, 3),
    "first and last empty": (0, 6, 0),
    "no row at all": (0, 0, 0),
}


def literal(x, weight, counts):
    out, start = [], 0
    for expert, count in enumerate(counts):
        out += [weight[expert] @ row for row in x[start : start + count]]
        start += count
    out += [weight.new_zeros(weight.shape[1])] * (x.shape[0] - start)
    return torch.stack(out) if out else x.new_zeros(0, weight.shape[1])


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, padding, backend):
    counts = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(sum(counts) + padding, 8, requires_grad=True)
    weight = torch.randn(3, 12, 8, requires_grad=True)
    probe = torch.randn(sum(counts) + padding, 12)
    out = grouped_linear(x, weight, counts, backend)
    expected = literal(x, weight, counts)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((out * probe).sum(), (x, weight))
    if not sum(counts):
        assert all(grad.abs().sum() == 0 for grad in ours)
        return
    theirs = torch.autograd.grad((expected * probe).sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradcheck_in_fp64():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, (2, 0, 4), "reference"), (x, weight))


def test_a_gradient_that_is_not_contiguous():
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(2, 4, 4, requires_grad=True)
    for backend in ("reference", "torch"):
        out = grouped_linear(x, weight, (2, 4), backend)
        grad = torch.autograd.grad(out, x, torch.ones(1, 1).expand(6, 4))[0]
        torch.testing.assert_close(grad, torch.cat([weight[0].sum(0).expand(2, -1), weight[1].sum(0).expand(4, -1)]))


def test_frozen_weights_and_frozen_rows():
    x, weight = torch.randn(4, 8), torch.randn(2, 4, 8, requires_grad=True)
    grouped_linear(x, weight, (1, 3)).sum().backward()
    assert weight.grad is not None
    x.requires_grad_()
    assert torch.autograd.grad(grouped_linear(x, weight.detach(), (1, 3)).sum(), x)[0].shape == x.shape


def test_autocast_casts_both():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(x, weight, (1, 3))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "weight", "counts", "backend", "message"),
    [
        ((4, 8), (2, 4, 7), (1, 3), "auto", r"x must be \(R, D\) and weight \(L, N, D\)"),
        ((4, 8), (2, 4, 8), (4,), "auto", "1 row counts for 2 experts"),
        ((4, 8), (2, 4, 8), (3, 2), "auto", "sum to at most the 4 rows"),
        ((4, 8), (2, 4, 8), (-1, 2), "auto", "must be >= 0"),
        ((4, 3), (2, 4, 3), (1, 3), "torch", "multiples of 16 bytes"),
        ((4, 8), (2, 4, 8), (1, 3), "cutlass", "use auto, reference, torch or triton"),
    ],
)
def test_wrong_input_is_refused(x, weight, counts, backend, message):
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.zeros(x), torch.zeros(weight), counts, backend)


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="cast one of them"):
        grouped_linear(torch.zeros(4, 8).bfloat16(), torch.zeros(2, 4, 8), (1, 3))
