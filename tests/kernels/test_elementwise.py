"""Normalisation, rotation and SwiGLU against autograd's own chain in fp64."""

import math

import pytest
import torch

from kernels.rms_norm import rms_norm
from kernels.rope import rotate
from kernels.swiglu import swiglu, swiglu_pair

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}


def compare(ours, reference, inputs, dtype):
    """Values and gradients of `ours` on rounded inputs against `reference` in fp64 on the same rounded inputs."""
    rounded = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    out, expected = ours(*rounded), reference(*exact)
    assert out.dtype == dtype
    probe = torch.randn(out.shape)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    grads = torch.autograd.grad(out, rounded, probe.to(dtype))
    expected_grads = torch.autograd.grad(expected, exact, probe.to(dtype).double())
    for a, b in zip(grads, expected_grads, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 4, 10), (1, 1), (0, 8)])
def test_rms_norm(shape, dtype):
    if not math.prod(shape):
        assert rms_norm(torch.zeros(shape), torch.ones(shape[-1])).shape == shape
        return
    torch.manual_seed(0)

    def reference(x, weight):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    compare(lambda x, w: rms_norm(x, w, 1e-6), reference, [torch.randn(shape), torch.rand(shape[-1]) + 0.5], dtype)


def test_rms_norm_of_zeros_is_zero_and_takes_strided_input():
    x = torch.zeros(3, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8))
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(x.grad).all()
    wide = torch.randn(4, 16)
    torch.testing.assert_close(rms_norm(wide[:, :8], torch.ones(8)), rms_norm(wide[:, :8].clone(), torch.ones(8)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rotation_turns_interleaved_pairs(dtype):
    torch.manual_seed(0)
    angles = torch.rand(6, 1, 4) * 6

    def reference(x):
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)

    compare(lambda x: rotate(x, angles.cos(), angles.sin()), reference, [torch.randn(2, 6, 3, 8)], dtype)


def test_rotation_keeps_products_of_equal_distance():
    torch.manual_seed(0)
    query, key = torch.randn(8), torch.randn(8)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])

    def product(t, s):
        at = [torch.tensor(float(position)) * frequencies for position in (t, s)]
        return rotate(query, at[0].cos(), at[0].sin()) @ rotate(key, at[1].cos(), at[1].sin())

    torch.testing.assert_close(product(5, 3), product(105, 103), rtol=1e-4, atol=1e-5)
    assert abs(product(5, 3) - product(3, 5)) > 1e-3


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_swiglu(dtype):
    torch.manual_seed(0)

    def reference(gate, up):
        return gate * torch.sigmoid(gate) * up

    gate, up = torch.randn(3, 5, 6) * 3, torch.randn(3, 5, 6)
    compare(swiglu_pair, reference, [gate, up], dtype)
    compare(swiglu, lambda both: reference(*both.chunk(2, -1)), [torch.cat([gate, up], -1)], dtype)
