"""Routed experts through an exchange against every expert applied to every token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.exchange import LocalExchange
from model.init import init_weights
from model.moe import MoE
from model.transformer import Transformer
from tests.unit.literal_model import TINY


def moe(config=TINY, seed=1) -> MoE:
    model = Transformer(config, LocalExchange())
    init_weights(model, seed)
    return model.layers[1].mlp


def dense(module: MoE, x, topk_ids, topk_weights):
    """All experts on all tokens, weighted by a matrix that is zero where an expert was not chosen."""
    flat = x.reshape(-1, x.shape[-1])
    mask = torch.zeros(flat.shape[0], module.n_routed_experts).scatter(1, topk_ids, topk_weights)
    gate_up = torch.einsum("td,end->ten", flat, module.experts.gate_up_proj)
    gate, up = gate_up.chunk(2, -1)
    out = torch.einsum("tei,edi,te->td", F.silu(gate) * up, module.experts.down_proj, mask)
    shared = module.shared_experts
    if shared is not None:
        inner = F.silu(flat @ shared.gate_proj.weight.t()) * (flat @ shared.up_proj.weight.t())
        out = out + inner @ shared.down_proj.weight.t()
    return out.view_as(x)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_values_and_gradients_equal_the_dense_computation(shared):
    module = moe(replace(TINY, n_shared_experts=shared))
    x = torch.randn(2, 7, TINY.hidden_size, requires_grad=True)
    probe = torch.randn(2, 7, TINY.hidden_size)
    out, counts, *_ = module(x)
    assert counts.sum() == 2 * 7 * TINY.num_experts_per_tok
    topk_ids, topk_weights, *_ = module.gate(x)
    expected = dense(module, x, topk_ids, topk_weights)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    inputs = (x, *module.parameters())
    ours = torch.autograd.grad((out * probe).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient():
    module = moe(replace(TINY, n_group=1, topk_group=1))
    module.gate.e_score_correction_bias[2] = -100.0
    x = torch.randn(1, 5, TINY.hidden_size)
    out, counts, *_ = module(x)
    out.square().sum().backward()
    assert counts[2] == 0
    assert module.experts.gate_up_proj.grad[2].abs().max() == 0
    assert module.experts.down_proj.grad[2].abs().max() == 0
    busy = int(counts.argmax())
    assert module.experts.gate_up_proj.grad[busy].abs().max() > 0
    assert torch.isfinite(module.gate.weight.grad).all()


def test_all_tokens_on_the_same_experts():
    module = moe(replace(TINY, n_group=1, topk_group=1))
    module.gate.e_score_correction_bias[[1, 6]] = 50.0
    x = torch.randn(3, 4, TINY.hidden_size)
    out, counts, *_ = module(x)
    assert counts.tolist() == [0, 12, 0, 0, 0, 0, 12, 0]
    topk_ids, topk_weights, *_ = module.gate(x)
    torch.testing.assert_close(out, dense(module, x, topk_ids, topk_weights), rtol=1e-5, atol=1e-6)


def each_row_as_it_is(rows, token_of_row, rows_per_expert, weights, scale):
    """Experts that hand rows through: the weighted sum alone."""
    picked = rows[token_of_row] * weights[:, None] * scale
    return torch.zeros_like(rows).index_add(0, token_of_row, picked)


def test_exchange_without_any_token():
    x = torch.zeros(0, 6, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    out, aside = LocalExchange().run(
        x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 4, each_row_as_it_is, (scale,)
    )
    assert out.shape == (0, 6) and aside is None
    out.sum().backward()
    assert x.grad.shape == (0, 6) and scale.grad == 0


def test_experts_get_choices_sorted_by_expert_in_token_order():
    seen = []

    def experts(rows, token_of_row, rows_per_expert, weights):
        seen.append((rows[token_of_row].flatten().tolist(), rows_per_expert, weights.tolist()))
        return each_row_as_it_is(rows, token_of_row, rows_per_expert, weights, 1.0)

    x = torch.arange(3.0)[:, None]
    ids = torch.tensor([[2, 0], [0, 3], [2, 3]])
    weights = torch.tensor([[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]])
    out, aside = LocalExchange().run(x, ids, weights, 4, experts, (), lambda: x + 1)
    moved = torch.tensor([0.1, 1.0, 0.0, 2.0, 1.1, 2.1]).tolist()
    assert seen == [([0, 1, 0, 2, 1, 2], (2, 0, 2, 2), moved)]
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    assert aside.flatten().tolist() == [1, 2, 3]


def test_experts_that_do_not_divide_are_refused():
    exchange = LocalExchange()
    exchange.ep_size = 3
    with pytest.raises(ValueError, match="n_routed_experts = 8 cannot be split over ep_size = 3"):
        MoE(TINY, exchange)
