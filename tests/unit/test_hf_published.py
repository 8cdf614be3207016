"""The config.json files that DeepSeek, Moonshot and Zhipu publish: the fields that they have and those that they lack.

Whole files are read as they are; folders are made of the same fields with small dimensions and random weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.config import ConfigError
from launch.schema import parse
from model.attention import Attention
from model.config import ModelConfig, YarnConfig
from model.hf_config import export_problems, from_hf, to_hf
from model.hf_names import hf_tensors
from model.positions import inverse_frequencies
from tests.unit import hf_cases

KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 163840,
}  # fmt: skip
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
GLM_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
SMALL = replace(
    hf_cases.random_config(3, "v3"), hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
    first_k_dense_replace=1, num_nextn_predict_layers=1, n_routed_experts=16, n_group=8, topk_group=4,
    num_experts_per_tok=3, rope_scaling=None,
)  # fmt: skip


def read(table: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
    problems: list[str] = []
    values = from_hf(table, problems)
    model = parse(ModelConfig, values, "model", problems)
    return model, problems + model.problems()


def weights(config: ModelConfig) -> dict[str, Tensor]:
    ours = hf_cases.logical(hf_cases.random_model(config, 0))
    return {
        one.name: ours[one.source].reshape(-1)[one.start : one.start + one.numel].reshape(one.shape).clone()
        for one in hf_tensors(config)
    }


def fields(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """config.json of a model; a value of `...` takes the field out."""
    table = {**to_hf(config, dtype="float32", bos_token_id=0, eos_token_id=0), **more}
    return {key: value for key, value in table.items() if value is not ...}


def test_kimi_k2_is_read() -> None:
    model, problems = read(KIMI_K2)
    assert not problems
    assert model.rope_scaling == YarnConfig(32.0, 4096, 1.0, 1.0, 1.0, 1.0)
    assert (model.n_group, model.topk_group, model.routed_scaling_factor) == (1, 1, 2.827)
    table = fields(model)
    assert table["model_type"] == "deepseek_v3" and read(table) == (model, [])  # what goes out comes in


def test_equal_betas_make_a_step() -> None:
    """A pair that turns more than once in the original context keeps its frequency, every slower one is divided."""
    model = replace(read(KIMI_K2)[0])
    for i, found in enumerate(inverse_frequencies(model)):
        plain = model.rope_theta ** (-2 * i / 64)
        turns = plain * 4096 / (2 * torch.pi)
        if turns > 1.6 or turns < 0.6:  # beyond the one pair on the step
            assert found == pytest.approx(plain if turns > 1 else plain / 32), i
    assert YarnConfig(beta_fast=1.0, beta_slow=2.0).problems()  # the wrong way round stays refused


@pytest.mark.parametrize("table", [MOONLIGHT, GLM_FLASH], ids=["moonlight", "glm-4.7-flash"])
def test_an_epsilon_of_the_latents_own_is_read(table: dict[str, Any]) -> None:
    model, problems = read(table)
    assert not problems and not export_problems(model)
    small = replace(model, hidden_size=32, num_attention_heads=2, q_lora_rank=6, kv_lora_rank=8)
    attention = Attention(small)
    assert attention.kv_a_layernorm.eps == attention.q_a_layernorm.eps == 1e-6
    assert model.rms_norm_eps == 1e-5
    assert read(fields(model)) == (model, [])


def test_dense_layers_of_glm_by_layer_types() -> None:
    table = {**GLM_FLASH, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
    del table["first_k_dense_replace"]
    assert read(table)[0].first_k_dense_replace == 2
    assert "has 2 dense layers" in read({**table, "first_k_dense_replace": 1})[1][0]


MISSING = [
    ("deepseek_v3", "n_group", 8), ("deepseek_v3", "topk_group", 4), ("deepseek_v3", "routed_scaling_factor", 2.5),
    ("deepseek_v3", "norm_topk_prob", True), ("deepseek_v3", "scoring_func", "sigmoid"),
    ("deepseek_v3", "topk_method", "noaux_tc"), ("deepseek_v3", "rms_norm_eps", 1e-6),
    ("deepseek_v3", "initializer_range", 0.02), ("kimi_k2", "n_group", 8), ("kimi_k2", "topk_group", 4),
    ("glm4_moe_lite", "n_group", 1), ("glm4_moe_lite", "routed_scaling_factor", 1.8),
    ("glm4_moe_lite", "rms_norm_eps", 1e-5), ("glm4_moe_lite", "first_k_dense_replace", 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), MISSING)
def test_a_missing_field_is_what_the_reference_takes(kind: str, name: str, value: Any) -> None:
    base = replace(SMALL, routed_scaling_factor=1.0, norm_topk_prob=False, initializer_range=0.5, n_routed_experts=32)
    base = replace(base, n_group=16 if name == "topk_group" else 4, topk_group=3 if name != "n_group" else 1)
    model, problems = read(fields(base, model_type=kind, **{name: ...}))
    assert not problems and getattr(model, name) == value


def test_groups_of_deepseek_v2_have_no_default() -> None:
    config = hf_cases.random_config(1, "v2")
    grouped = replace(config, topk_method="group_limited_greedy", n_group=2, topk_group=1, n_routed_experts=8)
    for told in (..., None):
        _, problems = read(fields(grouped, n_group=told))
        assert any("lacks n_group" in problem for problem in problems)
    greedy = replace(grouped, topk_method="greedy", n_group=1)
    assert read(fields(greedy, n_group=..., topk_group=..., topk_method=...)) == (greedy, [])


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """F8_E8M0, the type behind `scale_fmt: ue8m0`: one byte, the exponent alone."""
    tensors, meant = weights(SMALL), {}
    for name in [name for name in tensors if name.endswith("_proj.weight") and "eh_proj" not in name]:
        rows, columns = tensors[name].shape
        scales = 2.0 ** torch.randint(
            -8, 8, (-(-rows // 4), -(-columns // 4)), generator=torch.Generator().manual_seed(1)
        )
        spread = scales.repeat_interleave(4, 0)[:rows].repeat_interleave(4, 1)[:, :columns]
        eight = (tensors[name] / spread).to(torch.float8_e4m3fn)
        meant[name] = eight.float() * spread
        tensors[name], tensors[f"{name}_scale_inv"] = eight, scales.to(torch.float8_e8m0fnu)
    told = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [4, 4]}
    table = fields(SMALL, quantization_config=told)
    reader = hf_cases.bring_in(hf_cases.write_folder(tmp_path / "hf", table, tensors), tmp_path)
    for one in hf_tensors(SMALL):
        if one.name in meant:
            found = reader.read(one.source, "weight", one.start, one.start + one.numel).view(one.shape)
            assert torch.equal(found, meant[one.name]), one.name
    # Scales of a type that cannot be read are named before anything is written.
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)
    folder = hf_cases.write_folder(tmp_path / "odd", table, tensors)
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match=r"o_proj\.weight_scale_inv is I32; scales can be read in F32"):
        hf_cases.bring_in(folder, tmp_path / "work")
    assert not (tmp_path / "work" / "imported").exists()


@pytest.mark.parametrize(("told", "shown"), [(..., "missing"), (0, "0"), (None, "null"), (2, "2")])
def test_a_prediction_layer_that_config_json_does_not_tell(told: Any, shown: str, tmp_path: Path) -> None:
    folder = hf_cases.write_folder(tmp_path / "hf", fields(SMALL, num_nextn_predict_layers=told), weights(SMALL))
    with pytest.raises(ConfigError) as refused:
        hf_cases.bring_in(folder, tmp_path)
    (problem,) = refused.value.problems
    assert f"num_nextn_predict_layers is {shown}, and the weights hold 1 prediction layer(s), from layer 2" in problem
    assert "set num_nextn_predict_layers = 1" in problem
