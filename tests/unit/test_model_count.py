"""Totals of the published models to the last parameter; FLOPs against counted products."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.products import products_through
from model.count import count_parameters, flops_per_token
from model.exchange import LocalExchange
from model.transformer import Transformer
from tests.unit.literal_model import TINY, batch, build
from tests.unit.test_model_config import NAMES, preset


@pytest.mark.parametrize("name", NAMES)
def test_formula_equals_the_model_built_on_the_meta_device(name):
    config = preset(name)
    model = Transformer(config, LocalExchange(), device="meta")
    counts = count_parameters(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total
    in_modules = sum(parameter.numel() for parameter in model.mtp.parameters())
    assert (counts.main, counts.mtp) == (counts.total - in_modules, in_modules)
    assert sum(buffer.numel() for buffer in model.buffers()) == counts.bias


def test_published_totals():
    v3 = count_parameters(preset("v3-671b"))
    assert v3.main == 671_026_404_352
    assert v3.main + 58 * 256 == 671_026_419_200  # the published number counts the biases of the 58 layers
    assert round(v3.active / 1e9, 1) == 37.6
    lite = count_parameters(preset("v2-lite"))
    assert lite.total == 15_706_484_224
    debug = count_parameters(preset("debug"))
    assert 3e6 < debug.total < 5e6


def test_active_parameters_leave_out_idle_experts():
    config = replace(TINY, num_nextn_predict_layers=0)
    counts = count_parameters(config)
    one = count_parameters(replace(config, n_routed_experts=8, num_experts_per_tok=3))
    assert one.active - counts.active == 3 * config.hidden_size * config.moe_intermediate_size
    assert one.total == counts.total


@pytest.mark.parametrize("modules", [0, 2])
def test_flops_equal_the_products_of_a_real_step(modules):
    config = replace(TINY, num_nextn_predict_layers=modules)
    model = build(config)
    sequences, length = 3, 16
    tokens, targets = batch(config, sequences, length)
    # Through oneDNN some rows of an expert are computed twice.
    with products_through(onednn=False), FlopCounterMode(display=False) as counter:
        output = model(tokens, None, targets)
        (output.token_losses.sum() + sum(losses.sum() for losses in output.mtp_token_losses)).backward()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in products)

    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = sum(
        6 * (length - k + 1) / 2 * heads * (length - k) * sequences * (config.num_hidden_layers if k == 0 else 1)
        for k in range(modules + 1)
    )
    assert flops_per_token(config, length) * length * sequences - attention == pytest.approx(counted, rel=1e-9)
