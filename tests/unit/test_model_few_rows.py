"""The feed-forward of generation: the layer's own, whichever way so many tokens go."""

from types import SimpleNamespace

import pytest
import torch

from kernels import products
from model.few_rows import FEW, FeedForward
from model.moe import MoE
from tests.unit.literal_model import TINY, build

WAYS = {
    1: "_one",
    2: "_several",
    5: "_all",
    16: "_all",
    17: "_several",
    FEW: "_several",
    FEW + 1: "_many",
    130: "_many",
}


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("n_tokens", WAYS)
def test_equals_the_layers_own_forward(monkeypatch: pytest.MonkeyPatch, n_tokens: int, onednn: bool) -> None:
    if onednn and not products.stays_exact():  # oneDNN would round them: MKL multiplies what is cut up for it
        monkeypatch.setattr(products, "_SETTINGS", SimpleNamespace())
    layer = next(module for module in build(TINY).eval().modules() if isinstance(module, MoE))
    assert layer.experts.gate_up_proj.shape[0] == 8 and TINY.num_experts_per_tok == 2
    taken = []
    for name in set(WAYS.values()):
        way = getattr(FeedForward, name)

        def noted(*arguments, name=name, way=way):
            taken.append(name)
            return way(*arguments)

        monkeypatch.setattr(FeedForward, name, staticmethod(noted) if name in ("_all", "_many") else noted)
    x = torch.randn(n_tokens, TINY.hidden_size, generator=torch.Generator().manual_seed(n_tokens))
    with torch.no_grad(), products.products_through(onednn):
        expected = layer(x.unsqueeze(0))[0].squeeze(0)
        found = FeedForward(layer).forward(x)
    assert taken == [WAYS[n_tokens]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
