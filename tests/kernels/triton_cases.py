"""The Triton kernels against their references. Run by test_triton.py: in Triton's interpreter, or on a GPU.

bfloat16 arithmetic is wrong in the interpreter, so it is tested on a GPU only.
"""

import pytest
import torch

from kernels.grouped_mm import grouped_linear
from kernels.grouped_mm_triton import row_tiles
from kernels.rms_norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def compare(op, inputs, dtype):
    """Both backends on the same rounded inputs; the reference in fp32, so that only the kernel rounds."""
    rounded = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().float().requires_grad_() for tensor in rounded]
    out, expected = op(*rounded, "triton"), op(*exact, "reference")
    assert out.dtype == dtype
    probe = torch.randn(out.shape).to(DEVICE, dtype)
    ours = torch.autograd.grad(out, rounded, probe)
    theirs = torch.autograd.grad(expected, exact, probe.float())
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.float(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 64), (1, 1), (600, 7), (0, 8)], ids=str)
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.rand(shape[-1]) + 0.5]
    compare(lambda x, weight, backend: rms_norm(x, weight, 1e-6, backend), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("counts", [(70, 5, 64), (0, 9, 0), (0, 0, 0), (1, 130, 2)], ids=str)
def test_grouped_linear(counts, padding, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(sum(counts) + padding, 40), torch.randn(3, 72, 40) / 6
    compare(lambda x, w, backend: grouped_linear(x, w, counts, backend), [x, weight], dtype)


def test_padding_rows_are_zero_with_zero_gradient():
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    out = grouped_linear(x, torch.randn(2, 16, 16, device=DEVICE), (2, 1), "triton")
    out.sum().backward()
    assert out[3:].abs().max() == 0
    assert x.grad[3:].abs().max() == 0


def test_tiles_cut_each_expert_alone():
    assert row_tiles((3, 0, 5), 4) == [(0, 0, 3), (2, 3, 8), (2, 7, 8)]
    assert row_tiles((0, 0), 4) == []
