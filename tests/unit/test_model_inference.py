"""Modules as plain functions: the same numbers as the modules, from the weights that lie there."""

import pytest
import torch
from torch import nn

import model.inference
from model.inference import linear_function, norm_function
from model.layers import Head, Linear, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_rows", [1, 7, 8, 300])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@torch.no_grad()
def test_the_same_as_the_module(dtype: torch.dtype, n_rows: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(n_rows)
    if large:
        monkeypatch.setattr(model.inference, "_LARGE", 1)
    linear, head, norm = Linear(48, 32, dtype=dtype), Head(48, 32, dtype=dtype), RMSNorm(48, 1e-2, dtype=dtype)
    linear.weight.normal_()
    head.weight.normal_()
    norm.weight.normal_(1.0, 0.1)
    x = torch.randn(n_rows, 48, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(linear_function(linear)(x), linear(x), rtol=bound, atol=bound)
    torch.testing.assert_close(linear_function(head)(x), head(x), rtol=bound, atol=bound)
    assert linear_function(linear)(x).is_contiguous()
    torch.testing.assert_close(norm_function(norm)(x), norm(x), rtol=bound / 10, atol=bound / 10)
    torch.testing.assert_close(norm_function(norm)(0 * x), 0 * x)


@torch.no_grad()
def test_weights_are_not_copied_and_other_modules_stay_themselves() -> None:
    linear = Linear(8, 4)
    linear.weight.zero_()
    run = linear_function(linear)
    linear.weight.fill_(1.0)
    assert torch.equal(run(torch.ones(1, 8)), torch.full((1, 4), 8.0))
    other = nn.Identity()
    assert linear_function(other) is other
