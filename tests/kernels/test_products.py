"""fp32 products on a CPU: the same numbers through either library, and few programs for groups of any length."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import products
from kernels.experts import experts_mlp

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [0, 1, 7, 15, 16, 17, 63, 64, 65, 128, 150, 255, 256, 257, 300, 511, 1000]


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products through one of the two, and as before afterwards."""
    if request.param == "onednn":
        _cut_as_for_onednn(monkeypatch)
    with products.products_through(request.param == "onednn"):
        yield request.param


def _cut_as_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN would round fp32 factors to bf16 (it is never chosen there), MKL computes what is cut for it."""
    if not products.stays_exact():
        monkeypatch.setattr(products, "_SETTINGS", SimpleNamespace())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of training, on a processor where oneDNN is better; every product is large enough for it."""
    _cut_as_for_onednn(monkeypatch)
    monkeypatch.setattr(products, "onednn_is_better", lambda: True)
    monkeypatch.setattr(products, "LEAST_PRODUCT", 1)


@pytest.mark.parametrize("n_rows", LENGTHS)
@pytest.mark.usefixtures("left_open")
def test_pieces_of_any_length(n_rows: int) -> None:
    rows, weight = draw(n_rows, 48), draw(32, 48)
    expected = rows.double() @ weight.double().t()
    with products.products_through(onednn=False), torch.inference_mode():
        out = torch.full((n_rows, 32), torch.nan)
        products.rows_product(rows, weight.t(), out)
        found = products.linear(rows.view(n_rows, 1, 48), weight).squeeze(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, out)
    wide = draw(n_rows, 60)[:, 7:55]  # a view with other strides
    torch.testing.assert_close(products.linear(wide, weight), wide @ weight.t(), rtol=1e-5, atol=1e-5)


def test_pieces_cover_all_rows_and_are_of_six_lengths() -> None:
    for n_rows in range(products.LEAST_ROWS, 3000):
        found = products._piece_lengths(n_rows)
        assert set(found) <= set(products.PIECES)
        assert n_rows <= sum(found) < n_rows + 32
        assert max(found) <= n_rows  # the last one takes what it lacks from the rows before


@pytest.mark.usefixtures("left_open")
def test_what_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    monkeypatch.setattr(products, "_in_pieces", lambda rows, matrix, out: pieces.append(rows.shape[0]))
    for dtype, n_rows in ((torch.float32, 8), (torch.float32, 7), (torch.bfloat16, 8)):
        products.linear(draw(n_rows, 48).to(dtype), draw(32, 48).to(dtype))
    with products.products_through(onednn=True):  # somebody chose for the process: lengths are few already
        products.linear(draw(8, 48), draw(32, 48))
    monkeypatch.setattr(products, "LEAST_PRODUCT", 8 * 48 * 32 + 1)
    products.linear(draw(8, 48), draw(32, 48))
    products.linear(draw(9, 48), draw(32, 48))
    monkeypatch.setattr(products, "onednn_is_better", lambda: False)
    products.linear(draw(9, 48), draw(32, 48))
    assert pieces == [8, 9]
    monkeypatch.setattr(products, "onednn_is_better", lambda: True)
    for inference in (False, True):  # outside it may be training without a choice: programs would take memory there
        with torch.inference_mode(inference):
            products.rows_product(draw(10, 48), draw(48, 32), torch.empty(10, 32))
    assert pieces == [8, 9, 10]


@pytest.mark.parametrize("n_rows", LENGTHS)
def test_groups_of_any_length(library: str, n_rows: int) -> None:
    rows, matrix, other = draw(n_rows, 48), draw(32, 48).t(), draw(n_rows, 32)
    out = torch.full((n_rows, 32), torch.nan)
    products.rows_product(rows, matrix, out)
    torch.testing.assert_close(out.double(), rows.double() @ matrix.double(), rtol=1e-5, atol=1e-5)
    expected = rows.double().t() @ other.double()
    outer = torch.full((48, 32), torch.nan)
    products.outer_product(rows, other, outer, add=False)
    torch.testing.assert_close(outer.double(), expected, rtol=1e-5, atol=1e-4)
    products.outer_product(rows, other, outer, add=True)
    torch.testing.assert_close(outer.double(), 2 * expected, rtol=1e-5, atol=2e-4)


def test_lengths_are_eight_to_a_doubling() -> None:
    lengths = {products._length(n_rows) for n_rows in range(1, 8193)}
    assert lengths == {*range(16, 257, 16), *range(256, 513, 32), *range(512, 1025, 64), *range(1024, 2049, 128),
                       *range(2048, 4097, 256), *range(4096, 8193, 512)}  # fmt: skip
    assert all(n_rows - n_rows % products._step(n_rows) in {0, *lengths} for n_rows in range(1, 8193))


def test_a_repeated_product_has_the_same_bits(library: str) -> None:
    rows, matrix = draw(150, 48), draw(48, 32)
    first, second = torch.empty(150, 32), torch.empty(150, 32)
    products.rows_product(rows, matrix, first)
    products.rows_product(rows, matrix, second)
    assert torch.equal(first, second)


def _moved(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same values so many cache lines further on, as torch aligns whatever it allocates."""
    room = torch.empty(x.numel() + 16 * by)
    return room[16 * by :].view(x.shape).copy_(x)


@pytest.mark.parametrize(("n_rows", "width", "n_out"), [(1, 32, 32), (7, 16, 48), (64, 8, 257), (130, 48, 16)])
def test_bits_depend_on_values_alone(library: str, n_rows: int, width: int, n_out: int) -> None:
    """Not on where torch allocated them, nor on what other threads compute: a repeated run has the same history.

    Within a cache line the place does matter to MKL where there is one row only (docs/kernels.md).
    """
    rows, weight, vector = draw(n_rows, width), draw(n_out, width), draw(width)

    def results(by: int) -> list[torch.Tensor]:
        x, w, v = _moved(rows, by), _moved(weight, by), _moved(vector, by)
        logits = x @ w.t()
        batch = torch.bmm(x.expand(2, *x.shape), w.t().expand(2, width, n_out))
        return [logits, batch, x @ v, w.t().contiguous() @ logits[0], logits.softmax(-1), logits.exp(), logits.sum(1)]

    expected = results(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(results, [*range(17)] * 4):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_experts_are_the_same_through_either_library(library: str) -> None:
    counts = (0, 70, 1, 129, 64)
    gate_up, down = draw(5, 32, 24).requires_grad_(), draw(5, 24, 16).requires_grad_()
    source, weights = draw(100, 24).requires_grad_(), draw(264).abs().requires_grad_()
    token = torch.randint(100, (264,), generator=torch.Generator().manual_seed(1))
    inputs = (source, gate_up, down, weights)

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = experts_mlp(cast[0], token, cast[1], cast[2], counts, cast[3], combine=True)
        return [out, *torch.autograd.grad(out.square().sum(), cast)]

    for found, expected in zip(results(torch.float32), results(torch.float64), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-5, atol=2e-6)


def test_the_choice() -> None:
    with products.products_through(products.in_steps()):  # for what comes after
        chosen = products.choose_products()
        assert chosen == products.in_steps() == (products._slow_in_mkl() and products.stays_exact())


def test_float64_is_left_alone(library: str) -> None:
    rows, matrix = draw(70, 48).double(), draw(48, 32).double()
    out = torch.empty(70, 32, dtype=torch.float64)
    products.rows_product(rows, matrix, out)
    assert torch.equal(out, rows @ matrix)


@pytest.mark.parametrize("n_rows", LENGTHS)
@pytest.mark.parametrize("in_onednn", [False, True])
def test_bf16_is_rounded_once_whatever_the_length(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, in_onednn: bool
) -> None:
    monkeypatch.setattr(products, "_bf16_in_onednn", lambda: in_onednn)
    rows, matrix, other = draw(n_rows, 48).bfloat16(), draw(48, 32).bfloat16(), draw(n_rows, 32).bfloat16()
    out, outer = torch.full((n_rows, 32), torch.nan).bfloat16(), torch.full((48, 32), torch.nan).bfloat16()
    products.rows_product(rows, matrix, out)
    products.outer_product(rows, other, outer, add=False)
    half_a_bit = 2.0**-8  # relative; and fp32 sums in another order may tip it to the next number
    torch.testing.assert_close(out.double(), rows.double() @ matrix.double(), rtol=half_a_bit, atol=1e-3)
    torch.testing.assert_close(outer.double(), rows.double().t() @ other.double(), rtol=half_a_bit, atol=1e-3)


def _train_on(n_rows: int, dtype: torch.dtype, number: int) -> None:
    rows, out = torch.ones(n_rows, 64, dtype=dtype), torch.empty(n_rows, 48, dtype=dtype)
    products.rows_product(rows, torch.ones(64, 48, dtype=dtype), out)
    outer = torch.zeros(64, 48, dtype=dtype)
    products.outer_product(rows, torch.ones(n_rows, 48, dtype=dtype), outer, add=number % 2 == 0)


def _train(dtype: torch.dtype) -> None:
    draw = random.Random(0)
    with products.products_through(onednn=True):
        for number in range(300):
            _train_on(draw.randrange(1, 500), dtype, number)


def _prompt(dtype: torch.dtype) -> None:
    draw = random.Random(0)
    for _ in range(300):
        products.linear(torch.ones(draw.randrange(1, 500), 64, dtype=dtype), torch.ones(48, 64, dtype=dtype))


class Shapes(TorchDispatchMode):
    """Notes the shapes of every product: each is a program that oneDNN makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.seen.add((func.overloadpacket, *(tuple(arg.shape) for arg in args)))
        return func(*args, **(kwargs or {}))


# 15 multiples of 16 below 256, 8 of 32 below 500, for each of: rows, outer, outer added. bf16 rounds up, to 512.
FEW = [
    pytest.param(_train, torch.float32, 30, 69, id="training"),
    pytest.param(_train, torch.bfloat16, 30, 72, id="training in bf16"),
    pytest.param(_prompt, torch.float32, 4, 6, id="prompts"),
]


@pytest.mark.parametrize(("work", "dtype", "least", "most"), FEW)
def test_three_hundred_lengths_are_few_shapes(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[torch.dtype], None], dtype: torch.dtype, least: int, most: int
) -> None:
    _cut_as_for_onednn(monkeypatch)
    monkeypatch.setattr(products, "_bf16_in_onednn", lambda: True)
    monkeypatch.setattr(products, "onednn_is_better", lambda: True)
    monkeypatch.setattr(products, "LEAST_PRODUCT", 1)
    with Shapes() as shapes:
        work(dtype)
    # The fewest rows of all go to MKL, each length in a shape of its own, and make no program.
    few = [shape for shape in shapes.seen if work is _train or shape[1][0] >= products.LEAST_ROWS]
    assert least <= len(few) <= most, sorted(map(str, few))


@pytest.mark.parametrize(("work", "dtype", "least", "most"), FEW)
def test_three_hundred_lengths_need_few_programs(
    work: Callable[[torch.dtype], None], dtype: torch.dtype, least: int, most: int
) -> None:
    """What oneDNN says itself; where torch gives it no products, on processors without AVX-512, it says nothing."""
    program = (
        "import torch; from kernels import products; from tests.kernels import test_products as t;"
        "products.onednn_is_better = lambda: True; products.LEAST_PRODUCT = 1;"
        f"t.{work.__name__}({dtype})"
    )
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines() if "create:cache_miss" in line and ",matmul," in line]
    if products._bf16_in_onednn():
        assert least <= len(made) <= most, len(made)
    else:
        assert not made


def test_factors_that_are_rounded_to_bf16_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left.bfloat16().float(), right.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products.stays_exact.__wrapped__()
    monkeypatch.setattr(products, "stays_exact", lambda: False)
    monkeypatch.setattr(products, "_slow_in_mkl", lambda: True)
    with products.products_through(products.in_steps()):
        assert not products.choose_products()
