"""Rows in 8 bits and back: error bounds, zeros, extremes, what is not finite."""

import pytest
import torch

from kernels.fp8 import FP8_MAX, dequantize_rows, quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_bounded_by_the_format(dtype):
    torch.manual_seed(0)
    x = (torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]).to(dtype)
    values, scales = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    error = (dequantize_rows(values, scales) - x.float()).abs()
    # half a step: relative 2^-4 for normal numbers, absolute half of 2^-9 below 2^-6
    bound = torch.maximum(x.float().abs() * 2.0**-4, (scales * 2.0**-10)[:, None])
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > 0).any()


def test_the_largest_of_a_row_comes_back_and_zeros_stay():
    x = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [1e-30, 0.0], [3e38, 1.0]])
    values, scales = quantize_rows(x)
    assert scales[0] == 1
    assert values[1].float()[0] == -FP8_MAX
    back = dequantize_rows(values, scales)
    torch.testing.assert_close(back[:, 0], x[:, 0], rtol=1e-6, atol=0)
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_comes_back_as_nan(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    back = dequantize_rows(*quantize_rows(x))
    assert back[1].isnan().all()
    assert torch.equal(back[[0, 2]], x[[0, 2]])


def test_no_row_and_the_asked_dtype():
    values, scales = quantize_rows(torch.zeros(0, 4))
    assert dequantize_rows(values, scales, torch.bfloat16).shape == (0, 4)
    assert dequantize_rows(*quantize_rows(torch.ones(1, 4)), torch.bfloat16).dtype == torch.bfloat16
