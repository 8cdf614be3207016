"""The formula of a step's peak memory: what it must do when a configuration changes. Measured in tests/ranks."""

from dataclasses import replace

import pytest

from model.config import ModelConfig
from model.count import count_parameters
from parallel.config import ParallelConfig
from parallel.step_memory import StepMemory, shares, step_memory

MODEL = ModelConfig(
    vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_nextn_predict_layers=0, num_attention_heads=4,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=1024,
    moe_intermediate_size=128, first_k_dense_replace=1, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
    n_group=1, topk_group=1, max_position_embeddings=512,
)  # fmt: skip


def of(load: float = 1.0, batch: int = 4, model: ModelConfig = MODEL, **parallel: object) -> StepMemory:
    """On four ranks, 512 tokens a sequence."""
    return step_memory(model, ParallelConfig(**parallel), 4, batch, 512, load)  # type: ignore[arg-type]


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("modules", [0, 2])
def test_shares_of_all_ranks_are_the_model(ep_size: int, modules: int) -> None:
    model = replace(MODEL, num_nextn_predict_layers=modules)
    share = shares(model, ParallelConfig(ep_size=ep_size), 4)
    total = count_parameters(model).total
    assert share.dense + ep_size * share.experts == total
    assert share.owned * 4 == pytest.approx(total, abs=8)
    assert share.experts == (3 + modules) * share.layer_experts


def test_state_by_stage() -> None:
    total = 4 * count_parameters(MODEL).total
    assert of(zero_stage=0).state == 3 * total
    assert of(zero_stage=1).state == of(zero_stage=2).state == pytest.approx(total + 3 * total / 4, rel=1e-6)
    assert 5 * total / 4 < of(zero_stage=3).state < 1.4 * total, "and parameters too small to be cut"


def test_more_tokens_cost_and_recomputation_saves() -> None:
    assert of(batch=8).saved > 1.9 * of(batch=4).saved - 48 * 2**20  # the logits that are kept are bounded
    assert of(recompute=True).saved < 0.4 * of().saved
    assert of(recompute=True).peak < 0.75 * of().peak
    assert of(recompute=True).state == of().state


def test_a_busy_rank_needs_more_and_a_budget_bounds_it() -> None:
    assert of(ep_size=4, load=3.0).peak > 1.25 * of(ep_size=4).peak
    bounded = of(ep_size=4, load=3.0, rows_budget=2048)
    assert bounded.peak < of(ep_size=4).peak
    assert bounded.saved == of(ep_size=4, load=2.0, rows_budget=2048).saved, "only tokens are kept, whatever comes"
    assert of(ep_size=4, rows_budget=10**6) == of(ep_size=4), "a budget that nothing exceeds changes nothing"


def test_a_prediction_module_and_a_larger_vocabulary_are_counted() -> None:
    with_module = of(model=replace(MODEL, num_nextn_predict_layers=1))
    layer = (of(model=replace(MODEL, num_hidden_layers=5)).saved - of().saved) / 1.0
    assert with_module.saved - of().saved > layer, "a layer, its norms' inputs, and logits once more"
    large = of(model=replace(MODEL, vocab_size=131072))
    extra = 4 * 256 * (131072 - 2048)
    assert large.state - of().state == pytest.approx(2 * extra * (1 + 3 / 4), rel=1e-6)
    assert large.saved - of().saved < 48 * 2**20
