"""What only a GPU takes, tried with a stand-in for it: grouped_mm where it is a kernel, and its empty experts."""

import itertools

import pytest
import torch

from kernels import experts_reference, grouped_mm
from kernels.experts import experts_mlp

COUNTS = (10, 0, 14, 0)
EMPTY = [1, 3]


def leaves_empty_experts_as_they_were(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """torch's grouped product as on compute capability 10: parts of experts without rows are whatever was in memory."""
    ends = [0, *offs.tolist()]
    spans = list(itertools.pairwise(ends))
    if b.dim() == 3:
        out = torch.full((a.shape[0], b.shape[2]), torch.nan, dtype=a.dtype)
        for expert, (start, end) in enumerate(spans):
            out[start:end] = a[start:end] @ b[expert]
        return out
    out = torch.full((len(spans), a.shape[0], b.shape[1]), 777.0, dtype=a.dtype)
    for expert, (start, end) in enumerate(spans):
        if end > start:
            out[expert] = a[:, start:end] @ b[start:end]
    return out


def test_experts_without_rows_have_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 16, generator=draw)
    gate_up = torch.randn(4, 16, 16, generator=draw, requires_grad=True)
    down = torch.randn(4, 16, 8, generator=draw, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = experts_mlp(x, None, gate_up, down, COUNTS, backend="reference")
        return torch.autograd.grad(out.square().sum(), (gate_up, down))

    expected = gradients()
    monkeypatch.setattr(experts_reference, "takes_grouped_mm", lambda rows, weight: True)
    monkeypatch.setattr(experts_reference, "grouped_mm", lambda: leaves_empty_experts_as_they_were)
    for found, right in zip(gradients(), expected, strict=True):
        assert not found[EMPTY].any()
        torch.testing.assert_close(found, right)


def test_the_torch_products_own_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_mm, "grouped_mm", lambda: leaves_empty_experts_as_they_were)
    x, weight = torch.randn(26, 16), torch.randn(4, 8, 16, requires_grad=True)
    grads = [
        torch.autograd.grad(grouped_mm.grouped_linear(x, weight, COUNTS, backend).square().sum(), weight)[0]
        for backend in ("torch", "reference")
    ]
    assert not grads[0][EMPTY].any()
    torch.testing.assert_close(*grads)


class OnGpu:
    """A tensor's looks: what decides which product is taken, without a device."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *shape: int) -> None:
        self.is_cuda, self.dtype, self.shape, self.device = True, dtype, shape, torch.device("cuda", 0)

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize(
    ("capability", "right", "taken"),
    [((9, 0), True, True), ((10, 0), True, True), ((10, 3), False, False), ((8, 0), True, False),
     ((8, 9), True, False), ((12, 0), True, False)],
)  # fmt: skip
def test_grouped_mm_is_taken_only_where_it_is_a_kernel_that_is_right(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], right: bool, taken: bool
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr(grouped_mm, "_grouped_mm_is_right", lambda device: right)
    x, weight = OnGpu(torch.bfloat16, 8, 16), OnGpu(torch.bfloat16, 4, 32, 16)
    assert grouped_mm.takes_grouped_mm(x, weight) is taken  # type: ignore[arg-type]
    assert not grouped_mm.takes_grouped_mm(OnGpu(torch.float32, 8, 16), weight)  # type: ignore[arg-type]
    assert not grouped_mm.takes_grouped_mm(x, OnGpu(torch.bfloat16, 4, 33, 16))  # type: ignore[arg-type]


def test_a_wrong_grouped_product_is_seen_before_anything_is_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check = grouped_mm._grouped_mm_is_right.__wrapped__
    assert check(torch.device("cpu"))
    monkeypatch.setattr(grouped_mm, "grouped_mm", lambda: leaves_empty_experts_as_they_were)
    assert check(torch.device("cpu"))  # what it leaves in empty experts is mended

    def wrong(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return leaves_empty_experts_as_they_were(a, b, offs) * 1.5

    def raises(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("strides should be multiple of 16 bytes")

    for broken, text in ((wrong, "differs from a loop"), (raises, "strides should be")):
        monkeypatch.setattr(grouped_mm, "grouped_mm", lambda broken=broken: broken)
        with pytest.warns(UserWarning, match=text):
            assert not check(torch.device("cpu"))
