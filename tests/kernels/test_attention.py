"""Causal attention in blocks against all S x S products in fp64, values and gradients, with and without documents."""

import pytest
import torch
from torch import Tensor

import kernels.attention
from kernels.attention import BLOCK, causal_attention


def literal(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """All products at once."""
    size = queries.shape[2]
    allowed = torch.ones(size, size, dtype=torch.bool).tril() if mask is None else mask
    scores = (queries @ keys.transpose(2, 3) * scale).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ values


def documents(batch: int, seq_len: int) -> Tensor:
    """(B, 1, S, S): each sequence cut at a place of its own."""
    ids = torch.stack([(torch.arange(seq_len) >= seq_len * (b + 1) // (batch + 1)).long() for b in range(batch)])
    return (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()


def inputs(batch: int, heads: int, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries and keys of width 12, values of width 7, in the strides that views give, and an upstream gradient."""
    generator = torch.Generator().manual_seed(batch * 1000 + seq_len)
    widths = (12, 12, 7, 7)
    made = [torch.randn(batch, seq_len, heads, w, generator=generator, dtype=torch.float64) for w in widths]
    return tuple(one.to(dtype).transpose(1, 2) for one in made)


@pytest.mark.parametrize("masked", [False, True], ids=["one document", "two documents"])
@pytest.mark.parametrize("seq_len", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 2), (2, 5)])
def test_blocks_are_the_whole(batch: int, heads: int, seq_len: int, masked: bool, monkeypatch) -> None:
    """A group here is a head alone, some heads of a sequence, or several sequences."""
    monkeypatch.setattr(kernels.attention, "GROUP_BYTES", 2 * BLOCK * 100 * 4)
    mask = documents(batch, seq_len) if masked else None
    exact = [one.double().requires_grad_() for one in inputs(batch, heads, seq_len, torch.float32)[:3]]
    upstream = inputs(batch, heads, seq_len, torch.float64)[3]
    whole = literal(*exact, 0.3, mask)
    wanted = [whole.detach(), *torch.autograd.grad(whole, exact, upstream)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        given = [one.detach().to(dtype).requires_grad_() for one in exact]
        out = causal_attention(given[0], given[1], given[2], 0.3, mask)
        found = [out.detach(), *torch.autograd.grad(out, given, upstream.to(dtype))]
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape == theirs.shape
            assert torch.allclose(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def test_a_later_position_changes_nothing() -> None:
    """Not even one that is not a number, as long as its block is not the query's own."""
    queries, keys, values, _ = inputs(1, 2, 2 * BLOCK, torch.float32)
    before = causal_attention(queries, keys, values, 0.3)[:, :, :BLOCK].clone()
    keys[:, :, BLOCK:], values[:, :, BLOCK:] = float("nan"), float("nan")
    assert torch.equal(causal_attention(queries, keys, values, 0.3)[:, :, :BLOCK], before)


@pytest.mark.parametrize("masked", [False, True])
def test_other_dtypes_take_torchs_own_with_padded_values(masked: bool) -> None:
    mask = documents(2, 70) if masked else None
    given = [one.detach().requires_grad_() for one in inputs(2, 3, 70, torch.bfloat16)[:3]]
    out = causal_attention(given[0], given[1], given[2], 0.3, mask)
    whole = literal(*(one.detach().double() for one in given), 0.3, mask)
    assert out.shape == whole.shape and out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), whole, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = causal_attention(*(one.detach().float() for one in given), 0.3, mask)
    assert torch.allclose(cast.double(), whole, rtol=0.03, atol=0.03)


def test_nothing_of_all_products_is_kept() -> None:
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    given = [one.contiguous().requires_grad_() for one in inputs(2, 3, 200, torch.float32)[:3]]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        causal_attention(given[0], given[1], given[2], 0.3)
    assert kept == sum(one.nbytes for one in given)
