"""The experts' whole feed-forward as one function, against autograd through a loop over rows, and its memory."""

import pytest
import torch
import torch.nn.functional as F

import kernels.experts_reference
from kernels.experts import experts_mlp
from kernels.experts_reference import Piece, pieces

TOKENS, HIDDEN, WIDTH = 9, 6, 5
COUNTS = {
    "even": (6, 6, 6),
    "skewed": (1, 15, 2),
    "an empty expert": (7, 0, 11),
    "first and last empty": (0, 18, 0),
    "padding": (4, 5, 2),
    "no row used": (0, 0, 0),
}


def literal(source, token_of_row, gate_up, down, counts, weights, combine):
    """Row by row, in the inputs' dtype."""
    rows = source if token_of_row is None else source[token_of_row]
    out = [torch.zeros_like(row) for row in rows]
    start = 0
    for expert, count in enumerate(counts):
        for row in range(start, start + count):
            gate, up = (gate_up[expert] @ rows[row]).chunk(2)
            out[row] = down[expert] @ (F.silu(gate) * up) * (1 if weights is None else weights[row])
        start += count
    result = torch.stack(out) if out else rows.clone()
    return result if not combine else torch.zeros_like(source).index_add(0, token_of_row, result)


def inputs(dtype=torch.float32, n_experts=3, gather=True, seed=0):
    torch.manual_seed(seed)
    token_of_row = torch.randint(0, TOKENS, (18,)) if gather else None
    source = torch.randn(TOKENS if gather else 18, HIDDEN)
    made = [
        source,
        torch.randn(n_experts, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
        torch.randn(n_experts, HIDDEN, WIDTH) / WIDTH**0.5,
        torch.rand(18) + 0.1,
    ]
    source, gate_up, down, weights = (tensor.to(dtype).requires_grad_() for tensor in made)
    return source, token_of_row, gate_up, down, weights


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize("form", ["rows", "gathered", "weighted", "combined", "unweighted and combined"])
@pytest.mark.parametrize("case", COUNTS)
def test_values_and_gradients(case, form, keep_hidden, small_pieces, monkeypatch):
    if small_pieces:
        monkeypatch.setattr(kernels.experts_reference, "_piece_rows", lambda gate_up: 4)
    source, token_of_row, gate_up, down, weights = inputs(gather=form != "rows")
    weighted, combine = form in ("weighted", "combined", "rows"), "combined" in form
    leaves = [source, gate_up, down] + ([weights] if weighted else [])
    out = experts_mlp(
        source, token_of_row, gate_up, down, COUNTS[case], weights if weighted else None, combine=combine,
        keep_hidden=keep_hidden,
    )  # fmt: skip
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = literal(
        exact[0], token_of_row, exact[1], exact[2], COUNTS[case], exact[3] if weighted else None, combine
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn(out.shape)
    ours = torch.autograd.grad(out, leaves, probe)
    if not sum(COUNTS[case]):
        assert all(not grad.any() for grad in ours)
        return
    theirs = torch.autograd.grad(expected, exact, probe.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", [False, True])
def test_gradcheck_in_fp64(combine):
    source, token_of_row, gate_up, down, weights = inputs(torch.float64)

    def op(source, gate_up, down, weights):
        return experts_mlp(source, token_of_row, gate_up, down, (3, 0, 14), weights, combine=combine)

    assert torch.autograd.gradcheck(op, (source, gate_up, down, weights))


def test_counts_may_be_a_tensor():
    source, token_of_row, gate_up, down, weights = inputs()
    given = experts_mlp(source, token_of_row, gate_up, down, torch.tensor([5, 0, 9]), weights)
    assert torch.equal(given, experts_mlp(source, token_of_row, gate_up, down, (5, 0, 9), weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_fp32(dtype):
    source, token_of_row, gate_up, down, _ = inputs(dtype)
    weights = torch.rand(18).requires_grad_()
    out = experts_mlp(source, token_of_row, gate_up, down, (6, 5, 7), weights, combine=True)
    assert out.dtype == dtype
    exact = [leaf.detach().double() for leaf in (source, gate_up, down, weights)]
    expected = literal(exact[0], token_of_row, exact[1], exact[2], (6, 5, 7), exact[3], True)
    # four roundings on the way: hidden, activation, row, sum
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    out.float().sum().backward()
    assert weights.grad.dtype == torch.float32
    assert source.grad.dtype == gate_up.grad.dtype == dtype


def test_autocast_casts_and_keeps_the_weights_in_fp32():
    source, token_of_row, gate_up, down, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = experts_mlp(source, token_of_row, gate_up, down, (6, 6, 6), weights)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert source.grad.dtype == gate_up.grad.dtype == weights.grad.dtype == torch.float32


def test_frozen_inputs_get_no_gradient_and_the_rest_do():
    source, token_of_row, gate_up, down, weights = inputs()
    for frozen in (0, 2, 3, 4):
        arguments = [source, token_of_row, gate_up, down, weights]
        arguments[frozen] = arguments[frozen].detach()
        out = experts_mlp(*arguments[:4], (6, 6, 6), arguments[4])
        leaves = [leaf for leaf in arguments if leaf is not None and leaf.requires_grad]
        assert len(leaves) == 3
        assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_only_inputs_and_the_first_product_are_kept(keep_hidden):
    source, token_of_row, gate_up, down, weights = inputs()
    out = experts_mlp(source, token_of_row, gate_up, down, (6, 6, 6), weights, keep_hidden=keep_hidden)
    kept = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]
    given = [tensor.data_ptr() for tensor in (source, token_of_row, gate_up, down, weights)]
    extra = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given]
    assert extra == ([(18, 2 * WIDTH)] if keep_hidden else [])


def test_two_runs_are_equal_to_the_last_bit():
    source, token_of_row, gate_up, down, weights = inputs()

    def run():
        out = experts_mlp(source, token_of_row, gate_up, down, (6, 6, 6), weights, combine=True)
        return torch.autograd.grad(out.sin().sum(), (source, gate_up, down, weights))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_pieces_hold_every_row_once_and_cut_only_long_experts():
    assert pieces((3, 0, 5, 1), 4) == [
        Piece(0, 3, (0,), (3,), False),
        Piece(3, 7, (2,), (4,), False),
        Piece(7, 9, (2, 3), (1, 1), True),
    ]
    assert pieces((0, 0), 4) == []
    assert pieces((2, 2, 4), 4) == [Piece(0, 4, (0, 1), (2, 2), False), Piece(4, 8, (2,), (4,), False)]
    assert pieces((9,), 4) == [
        Piece(0, 4, (0,), (4,), False),
        Piece(4, 8, (0,), (4,), True),
        Piece(8, 9, (0,), (1,), True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": (3, 6, 4)}, r"gate_up must be \(L, 2I, D\)"),
        ({"source": (9, 7)}, r"they must be \(T, D\)"),
        ({"weights": (17,)}, "give one for each row"),
        ({"counts": (18, 0)}, "2 row counts for 3 experts"),
        ({"counts": (18, 1, 0)}, "at most the 18 rows"),
        ({"counts": (-1, 1, 0)}, "must be >= 0"),
        ({"combine": True, "token_of_row": None, "weights": (9,)}, "needs token_of_row"),
        ({"backend": "cutlass"}, "use auto, reference or triton"),
        ({"dtype": torch.float64}, "cast them alike"),
    ],
)
def test_wrong_input_is_refused(change, message):
    shapes = {"source": (9, 6), "gate_up": (3, 10, 6), "down": (3, 6, 5), "weights": (18,)}
    made = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    if "dtype" in change:
        made["source"] = made["source"].to(change["dtype"])
    token_of_row = change.get("token_of_row", torch.zeros(18, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        experts_mlp(
            made["source"], token_of_row, made["gate_up"], made["down"], change.get("counts", (6, 6, 6)),
            made["weights"], combine=change.get("combine", False), backend=change.get("backend", "auto"),
        )  # fmt: skip
