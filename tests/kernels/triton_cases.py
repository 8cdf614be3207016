"""The Triton kernels against their references. Run by test_triton.py: in Triton's interpreter, or on a GPU.

The interpreter multiplies matrices of bfloat16 as if their bits were integers, so products run in it in fp32 and fp16,
and in bfloat16 on a GPU only; everything else runs in all three.
"""

import pytest
import torch

import kernels.cross_entropy
import kernels.cross_entropy_triton
import kernels.experts_triton
import kernels.grouped_mm_triton
import kernels.rms_norm_triton
from kernels.cross_entropy import linear_cross_entropy
from kernels.experts import experts_mlp
from kernels.fp8 import dequantize_rows, quantize_rows
from kernels.grouped_mm import grouped_linear
from kernels.grouped_mm_triton import row_tiles, rows_on_device
from kernels.permute import permute, sort_by_expert, unpermute
from kernels.permute_triton import rows_of_token, sum_rows
from kernels.rms_norm import rms_norm
from kernels.rope import rotate
from kernels.router_topk import RouterRule, router_topk
from kernels.swiglu import swiglu, swiglu_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRODUCT_DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]


def tolerance(dtype, length=1, roundings=1):
    """Of a sum of `length` products in fp32 with so many roundings to a dtype on the way: each costs half an eps, and
    in fp32 sums of n terms drift by about sqrt(n) eps."""
    return roundings * torch.finfo(dtype).eps + 4 * length**0.5 * torch.finfo(torch.float32).eps


def compare(op, inputs, dtype, length=1, roundings=1):
    """Triton on rounded inputs against the reference in fp64 on the same inputs: values and gradients."""
    rounded = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    out, expected = op(*rounded, "triton"), op(*exact, "reference")
    probe = torch.randn(out.shape).to(DEVICE, out.dtype)
    ours = torch.autograd.grad(out, rounded, probe)
    theirs = torch.autograd.grad(expected, exact, probe.to(expected.dtype))
    limit = tolerance(dtype, length, roundings)
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=limit, atol=limit * scale)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 64), (1, 1), (0, 8)], ids=str)
def test_rms_norm(shape, dtype, monkeypatch):
    monkeypatch.setattr(kernels.rms_norm_triton, "MAX_PROGRAMS", 2)  # so that a program takes several rows
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.rand(shape[-1]) + 0.5]
    rows = max(1, shape[0] * (shape[1] if len(shape) == 3 else 1))
    out = compare(lambda x, w, backend: rms_norm(x, w, 1e-6, backend), inputs, dtype, max(shape[-1], rows), 2)
    assert out.dtype == dtype


# Ragged, one huge group, no row at all, a group far larger than its neighbours.
COUNTS = [(40, 5, 33), (0, 90, 0), (0, 0, 0), (1, 100, 2)]
# The interpreter is slow: in fp32 it walks all of these tiles, in fp16 the ragged ones.
ROUTED = [(counts, torch.float32) for counts in COUNTS] + [
    (counts, dtype) for counts in (COUNTS if DEVICE == "cuda" else COUNTS[:1]) for dtype in PRODUCT_DTYPES[1:]
]


@pytest.mark.parametrize(("n_in", "n_out", "padding"), [(32, 160, 0), (40, 72, 3)], ids=["whole tiles", "cut tiles"])
@pytest.mark.parametrize(("counts", "dtype"), ROUTED, ids=str)
def test_grouped_linear(counts, dtype, n_in, n_out, padding):
    torch.manual_seed(0)
    x, weight = torch.randn(sum(counts) + padding, n_in), torch.randn(3, n_out, n_in) / 6
    compare(lambda x, w, backend: grouped_linear(x, w, counts, backend), [x, weight], dtype, 100)


def test_padding_rows_are_zero_with_zero_gradient():
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    out = grouped_linear(x, torch.randn(2, 16, 16, device=DEVICE), (2, 1), "triton")
    out.sum().backward()
    assert out[3:].abs().max() == 0
    assert x.grad[3:].abs().max() == 0


@pytest.mark.parametrize("on_device", [False, True])
def test_tiles_cut_each_expert_alone_and_the_padding(on_device):
    counts = torch.tensor([3, 0, 5], device=DEVICE) if on_device else (3, 0, 5)
    tiles = row_tiles(rows_on_device(counts, 10, torch.device(DEVICE)), 4)
    assert tiles.n_tiles.item() == 4
    assert tiles.table[:4].tolist() == [[0, 0], [2, 3], [2, 7], [3, 8]]
    assert row_tiles(rows_on_device((0, 0), 0, torch.device(DEVICE)), 4).n_tiles.item() == 0


@pytest.mark.parametrize("form", ["rows", "gathered", "weighted", "combined", "combined without weights"])
@pytest.mark.parametrize(("counts", "dtype"), ROUTED, ids=str)
def test_experts(counts, dtype, form):
    torch.manual_seed(0)
    hidden, width = (64, 32) if form in ("gathered", "combined") else (40, 24)  # whole tiles, cut tiles
    n_tokens, n_rows = 20, sum(counts) + (3 if form != "combined" else 0)
    token_of_row = None if form == "rows" else torch.randint(0, n_tokens, (n_rows,), device=DEVICE)
    weights = torch.rand(n_rows, device=DEVICE)
    given = weights if form in ("weighted", "combined") else None
    row_counts = torch.tensor(counts, device=DEVICE) if form == "weighted" else counts

    def op(source, gate_up, down, backend):
        scale = None if given is None else given.to(source.dtype if source.dtype == torch.float64 else torch.float32)
        return experts_mlp(
            source, token_of_row, gate_up, down, row_counts, scale, combine="combined" in form,
            keep_hidden=form != "gathered", backend=backend,
        )  # fmt: skip

    source = torch.randn(n_rows if token_of_row is None else n_tokens, hidden)
    inputs = [source, torch.randn(3, 2 * width, hidden) / hidden**0.5, torch.randn(3, hidden, width) / width**0.5]
    # rounded on the way: first product, activation, result, and again in the backward
    out = compare(op, inputs, dtype, 100, 4)
    assert out.dtype == dtype


def test_gradient_of_the_experts_weights():
    torch.manual_seed(0)
    source, gate_up, down = torch.randn(20, 40), torch.randn(3, 48, 40) / 6, torch.randn(3, 40, 24) / 5
    token_of_row = torch.randint(0, 20, (40,), device=DEVICE)

    def op(weights, backend):
        parts = (part.to(DEVICE, weights.dtype) for part in (source, gate_up, down))
        rows, first, second = parts
        return experts_mlp(rows, token_of_row, first, second, (30, 0, 7), weights, backend=backend)

    compare(op, [torch.rand(40)], torch.float32, 40)


def test_experts_again_and_with_few_programs_that_share_all_tiles_give_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    leaves = [torch.randn(20, 40), torch.randn(3, 48, 40), torch.randn(3, 40, 24), torch.rand(40)]
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
    token_of_row = torch.randint(0, 20, (40,), device=DEVICE)

    def run():
        out = experts_mlp(
            *leaves[:1], token_of_row, *leaves[1:3], (30, 0, 7), leaves[3], combine=True, backend="triton"
        )
        return torch.autograd.grad(out.square().sum(), leaves)

    first, again = run(), run()
    for module in (kernels.grouped_mm_triton, kernels.experts_triton):
        monkeypatch.setattr(module, "n_programs", lambda items, blocks, device: min(items, 2))
    for a, b, shared in zip(first, again, run(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, shared)


def test_experts_take_an_index_and_weights_with_gaps():
    torch.manual_seed(0)
    leaves = [torch.randn(20, 16), torch.randn(2, 16, 16), torch.randn(2, 16, 8)]
    source, gate_up, down = (leaf.to(DEVICE).requires_grad_() for leaf in leaves)
    both = torch.randint(0, 20, (30, 2), device=DEVICE)
    weights = torch.rand(30, 2, device=DEVICE)

    def run(index, scale):
        out = experts_mlp(source, index, gate_up, down, (11, 19), scale, combine=True, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), (source, gate_up, down))

    dense = run(both[:, 0].clone(), weights[:, 0].clone())
    for a, b in zip(run(both[:, 0], weights[:, 0]), dense, strict=True):
        assert torch.equal(a, b)


def routing(tokens=7, top_k=3, experts=5):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_permute_and_unpermute(top_k, dtype):
    torch.manual_seed(0)
    moved = sort_by_expert(routing(top_k=top_k))
    out = compare(lambda x, backend: permute(x, moved, top_k, backend), [torch.randn(7, 20)], dtype, top_k)
    assert out.shape == (7 * top_k, 20)

    def there(rows, weights, backend):
        return unpermute(rows, weights.to(torch.promote_types(weights.dtype, torch.float32)), moved, backend)

    compare(there, [torch.randn(7 * top_k, 20), torch.rand(7, top_k)], dtype, 20, 2)


def test_rows_of_a_token_any_number_of_them():
    rows = torch.arange(12.0, device=DEVICE).view(6, 2)
    by_token = rows_of_token(torch.tensor([2, 0, 2, 2, 0, 3], device=DEVICE), 5)
    assert by_token.bounds.tolist() == [0, 2, 2, 5, 6, 6]
    assert sum_rows(rows, by_token).tolist() == [[10, 12], [0, 0], [10, 13], [10, 11], [0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_takes_strided_input_and_broadcasts(dtype):
    torch.manual_seed(0)
    angles = torch.rand(6, 1, 3, device=DEVICE) * 6

    def op(x, backend):
        cos, sin = (table.to(torch.promote_types(x.dtype, torch.float32)) for table in (angles.cos(), angles.sin()))
        return rotate(x.split([4, 6], dim=-1)[1], cos, sin, backend)

    def reference(x, backend):
        if backend == "triton":
            return op(x, backend)
        even, odd = x[..., 4:].unflatten(-1, (3, 2)).unbind(-1)
        cos, sin = angles.double().cos(), angles.double().sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    compare(reference, [torch.randn(2, 6, 3, 10)], dtype, 2, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    torch.manual_seed(0)
    compare(swiglu, [torch.randn(3, 5, 12)], dtype, 2, 2)
    compare(swiglu_pair, [torch.randn(3, 5, 6), torch.randn(3, 5, 6)], dtype, 2, 2)
    assert swiglu(torch.zeros(0, 8, device=DEVICE), "triton").shape == (0, 4)


RULES = {
    "grouped sigmoid": (16, RouterRule(4, "sigmoid", 4, 2, 2, True, 2.5)),
    "groups of no power of two": (18, RouterRule(3, "sigmoid", 3, 2, 2, True, 2.5)),
    "plain softmax": (10, RouterRule(3, "softmax", 1, 1, 1, False, 1.0)),
    "grouped softmax": (12, RouterRule(2, "softmax", 4, 2, 1, False, 16.0)),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_router(name, biased, ties):
    experts, rule = RULES[name]
    torch.manual_seed(0)
    logits, bias = torch.randn(34, experts), torch.randn(experts) * 0.3
    if ties:  # sums of few different numbers: equal experts and equal groups
        logits, bias = (logits > 0).float(), bias.round()
    made = []
    for backend in ("triton", "reference"):
        leaf = logits.to(DEVICE).requires_grad_()
        choice = router_topk(leaf, bias.to(DEVICE) if biased else None, rule, 2, backend)
        probe = torch.linspace(-1, 1, choice.scores.numel(), device=DEVICE).view_as(choice.scores)
        total = (choice.topk_weights * choice.topk_weights.cos()).sum() + (choice.scores * probe).sum()
        made.append((*choice, *torch.autograd.grad(total, leaf)))
    ours, theirs = made
    for place in (0, 3, 4):  # ids, counts, changed choices
        assert torch.equal(ours[place], theirs[place])
    for place in (1, 2, 5):  # weights, scores, gradient
        torch.testing.assert_close(ours[place], theirs[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # the products are torch's
@pytest.mark.parametrize("keep_bytes", [0, 600, 2**20], ids=["none kept", "some kept", "all kept"])
def test_linear_cross_entropy(keep_bytes, dtype, monkeypatch):
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(kernels.cross_entropy, "LEAST_WORDS", 8)
    monkeypatch.setattr(kernels.cross_entropy_triton, "BLOCK", 4)  # so that a program takes several parts of a block
    torch.manual_seed(0)
    targets = torch.randint(0, 37, (13,), device=DEVICE)

    def op(hidden, weight, backend):
        return linear_cross_entropy(hidden, weight, targets, keep_bytes, backend)

    # logits of size up to 10 are rounded to the dtype, and with them the loss and, by its exponential, the gradient
    compare(op, [torch.randn(13, 6), torch.randn(37, 6)], dtype, 37, 10)


@pytest.mark.parametrize("shape", [(7, 40), (3, 9000), (2, 1), (0, 4)], ids=str)
def test_fp8_rows(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-8, 4, shape[0])[:, None]).to(DEVICE)
    x[:1] = 0
    (ours, our_scales), (theirs, their_scales) = quantize_rows(x, "triton"), quantize_rows(x, "reference")
    assert torch.equal(our_scales, their_scales)
    ours, theirs = ours.float(), theirs.float()
    if DEVICE == "cpu":  # the interpreter's cast loses the carry when rounding up to a power of two
        carried = theirs.abs().clamp(min=2.0**-9).frexp().mantissa == 0.5
        ours, theirs = ours[~carried], theirs[~carried]
    assert torch.equal(ours, theirs)
    values, scales = quantize_rows(x, "reference")
    for dtype in (torch.float32, torch.float16):
        back = dequantize_rows(values, scales, dtype, "triton")
        assert torch.equal(back, dequantize_rows(values, scales, dtype, "reference"))
