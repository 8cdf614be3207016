"""ModelConfig: presets are valid, every broken rule is named with its key and a way out."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ModelConfig, YarnConfig

PRESETS = Path(__file__).parents[2] / "launch" / "presets"
NAMES = ("debug", "laptop", "v2-lite", "v3-671b")


def preset(name: str) -> ModelConfig:
    return ModelConfig.from_dict(tomllib.loads((PRESETS / f"{name}.toml").read_text())["model"])


@pytest.mark.parametrize("name", NAMES)
def test_presets_have_no_problem(name):
    assert preset(name).problems() == []


def test_defaults_are_debug_but_for_the_queries_rank_and_initial_spread():
    assert ModelConfig().problems() == []
    assert replace(ModelConfig(), q_lora_rank=96, initializer_range=0.05) == preset("debug")


@pytest.mark.parametrize(
    ("change", "key", "way_out"),
    [
        ({"num_experts_per_tok": 9}, "model.num_experts_per_tok = 9", "groups of 4 offer; use at most 8"),
        ({"n_group": 3}, "model.n_group = 3", "use one of 1, 2, 4, 8, 16"),
        ({"topk_group": 5}, "model.topk_group = 5", "use at most 4"),
        ({"n_group": 16, "topk_group": 8}, "model.n_group = 16", "groups of at least 2 experts"),
        ({"qk_rope_head_dim": 15}, "model.qk_rope_head_dim = 15", "use 14 or 16"),
        ({"first_k_dense_replace": 5}, "model.first_k_dense_replace = 5", "use at most 4"),
        ({"scoring_func": "softmax"}, "model.topk_method = noaux_tc", "use group_limited_greedy or greedy"),
        ({"topk_method": "greedy"}, "model.n_group = 4", "use 1 and 1"),
        (
            {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 17},
            "model.num_experts_per_tok = 17",
            "use at most 16",
        ),
        ({"q_lora_rank": 0}, "model.q_lora_rank = 0", "leave it out"),
        ({"n_shared_experts": -1}, "model.n_shared_experts = -1", "use 0 for none"),
        ({"hidden_size": 0}, "model.hidden_size = 0", "at least 1"),
        ({"rms_norm_eps": 0.0}, "model.rms_norm_eps = 0.0", "above 0"),
        ({"tie_word_embeddings": True}, "model.tie_word_embeddings", "use false"),
        (
            {"rope_scaling": YarnConfig(original_max_position_embeddings=8192)},
            "model.rope_scaling.original_max_position_embeddings = 8192",
            "raise the latter",
        ),
        ({"rope_scaling": YarnConfig(factor=0.5)}, "model.rope_scaling.factor = 0.5", "use 1 or more"),
        ({"rope_scaling": YarnConfig(beta_slow=64)}, "model.rope_scaling.beta_slow = 64", "DeepSeek uses 1 and 32"),
    ],
)
def test_one_broken_rule_is_one_message(change, key, way_out):
    (message,) = replace(ModelConfig(), **change).problems()
    assert message.startswith(key)
    assert way_out in message


def test_all_problems_come_at_once():
    config = replace(ModelConfig(), qk_rope_head_dim=15, topk_group=9, first_k_dense_replace=7)
    assert len(config.problems()) == 3


def test_from_dict_reads_nested_scaling_and_names_unknown_keys():
    assert ModelConfig.from_dict({"rope_scaling": {"factor": 4.0}}).rope_scaling == YarnConfig(factor=4.0)
    with pytest.raises(TypeError, match="unknown keys n_expert"):
        ModelConfig.from_dict({"n_expert": 4})


def test_moe_layers_list_main_layers_before_modules():
    config = replace(ModelConfig(), num_hidden_layers=3, num_nextn_predict_layers=2)
    assert config.moe_layers == ("layers.1", "layers.2", "mtp.0.block", "mtp.1.block")
