"""The probe names layer, tensor and expert of the first non-finite number, forward and backward."""

import pytest
import torch

from model.probe import NonFiniteError, attach
from tests.unit.literal_model import TINY, batch, build


def step(model):
    tokens, targets = batch(TINY, 2, 12)
    output = model(tokens, None, targets)
    (output.token_losses.mean() + output.mtp_token_losses[0].mean()).backward()


def busiest(model, layer: str) -> int:
    tokens, targets = batch(TINY, 2, 12)
    counts = model(tokens, None, targets).routing.tokens_per_expert
    return int(counts[TINY.moe_layers.index(layer)].argmax())


def test_a_healthy_step_passes_and_removing_takes_every_hook_off():
    model = build()
    handle = attach(model)
    step(model)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer", TINY.moe_layers)
def test_names_layer_and_expert_of_a_bad_weight(layer, recompute):
    model = build(recompute=recompute)
    expert = busiest(model, layer)
    attach(model)
    with torch.no_grad():
        model.get_submodule(layer).mlp.experts.down_proj[expert, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"{layer}: mlp.experts output, expert {expert} is not finite") as caught:
        step(model)
    assert (caught.value.layer, caught.value.tensor, caught.value.expert) == (layer, "mlp.experts output", expert)


def test_names_experts_by_their_number_wherever_they_lie():
    model = build()
    attach(model)
    expert = busiest(model, "layers.1")
    moe = model.layers[1].mlp
    moe.place([(slot + 3) % TINY.n_routed_experts for slot in range(TINY.n_routed_experts)])
    with torch.no_grad():
        moe.experts.down_proj[moe.expert_of_slot.index(expert), 0, 0] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        step(model)
    assert caught.value.expert == expert


def test_names_a_dense_layer_and_the_head():
    model = build()
    attach(model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="model: lm_head output"):
        step(model)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"layers\.0: self_attn output is not finite \(\d+ of \d+ numbers"):
        step(model)


def test_finds_a_gradient_that_breaks_on_its_way_back():
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 0.0

    model = build()
    model.layers[1].mlp.register_forward_hook(lambda module, args, out: (Break.apply(out[0]), *out[1:]))
    attach(model)
    with pytest.raises(NonFiniteError) as caught:
        step(model)
    # the probe's hook came after the breaking one, so the first bad tensor it sees is inside that layer's experts
    assert caught.value.layer == "layers.1"
    assert caught.value.tensor.startswith("gradient of mlp.")
