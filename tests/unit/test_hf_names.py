"""Names, shapes and config.json of the Hugging Face format, against what is published, without transformers."""

import math
from dataclasses import replace

import pytest
import torch

from launch.config import from_tables, read
from launch.schema import parse
from model.config import ModelConfig, YarnConfig
from model.exchange import LocalExchange
from model.hf_config import export_problems, from_hf, to_hf
from model.hf_fp8 import dequantise, scale_shape
from model.hf_names import fused_tensors, hf_tensors, logical_tensors, prediction_layers
from model.naming import pieces
from model.slots import local_experts
from model.transformer import Transformer
from tests.unit.hf_cases import random_config


def preset(name: str) -> ModelConfig:
    problems: list[str] = []
    config = read(name, [], problems)
    assert not problems
    return config.model


def published_v3() -> dict[str, tuple[int, ...]]:
    """The tensors of deepseek-ai/DeepSeek-V3 (without its fp8 scales), written down from its index by rule."""
    hidden, heads, found = 7168, 128, {}

    def mlp(stem: str, width: int) -> None:
        found[f"{stem}.gate_proj.weight"] = found[f"{stem}.up_proj.weight"] = (width, hidden)
        found[f"{stem}.down_proj.weight"] = (hidden, width)

    for layer in range(62):
        stem = f"model.layers.{layer}"
        found[f"{stem}.input_layernorm.weight"] = found[f"{stem}.post_attention_layernorm.weight"] = (hidden,)
        found[f"{stem}.self_attn.q_a_proj.weight"] = (1536, hidden)
        found[f"{stem}.self_attn.q_a_layernorm.weight"] = (1536,)
        found[f"{stem}.self_attn.q_b_proj.weight"] = (heads * 192, 1536)
        found[f"{stem}.self_attn.kv_a_proj_with_mqa.weight"] = (576, hidden)
        found[f"{stem}.self_attn.kv_a_layernorm.weight"] = (512,)
        found[f"{stem}.self_attn.kv_b_proj.weight"] = (heads * 256, 512)
        found[f"{stem}.self_attn.o_proj.weight"] = (hidden, heads * 128)
        if layer < 3:
            mlp(f"{stem}.mlp", 18432)
            continue
        found[f"{stem}.mlp.gate.weight"] = (256, hidden)
        found[f"{stem}.mlp.gate.e_score_correction_bias"] = (256,)
        for expert in range(256):
            mlp(f"{stem}.mlp.experts.{expert}", 2048)
        mlp(f"{stem}.mlp.shared_experts", 2048)
    found["model.embed_tokens.weight"] = found["lm_head.weight"] = (129280, hidden)
    found["model.norm.weight"] = (hidden,)
    found["model.layers.61.embed_tokens.weight"] = found["model.layers.61.shared_head.head.weight"] = (129280, hidden)
    found["model.layers.61.eh_proj.weight"] = (hidden, 2 * hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        found[f"model.layers.61.{name}.weight"] = (hidden,)
    return found


def published_v2_lite() -> dict[str, tuple[int, ...]]:
    """The tensors of deepseek-ai/DeepSeek-V2-Lite, written down from its index by rule."""
    hidden, heads, found = 2048, 16, {}

    def mlp(stem: str, width: int) -> None:
        found[f"{stem}.gate_proj.weight"] = found[f"{stem}.up_proj.weight"] = (width, hidden)
        found[f"{stem}.down_proj.weight"] = (hidden, width)

    for layer in range(27):
        stem = f"model.layers.{layer}"
        found[f"{stem}.input_layernorm.weight"] = found[f"{stem}.post_attention_layernorm.weight"] = (hidden,)
        found[f"{stem}.self_attn.q_proj.weight"] = (heads * 192, hidden)
        found[f"{stem}.self_attn.kv_a_proj_with_mqa.weight"] = (576, hidden)
        found[f"{stem}.self_attn.kv_a_layernorm.weight"] = (512,)
        found[f"{stem}.self_attn.kv_b_proj.weight"] = (heads * 256, 512)
        found[f"{stem}.self_attn.o_proj.weight"] = (hidden, heads * 128)
        if layer < 1:
            mlp(f"{stem}.mlp", 10944)
            continue
        found[f"{stem}.mlp.gate.weight"] = (64, hidden)
        for expert in range(64):
            mlp(f"{stem}.mlp.experts.{expert}", 1408)
        mlp(f"{stem}.mlp.shared_experts", 2 * 1408)
    found["model.embed_tokens.weight"] = found["lm_head.weight"] = (102400, hidden)
    found["model.norm.weight"] = (hidden,)
    return found


@pytest.mark.parametrize(("name", "published"), [("v3-671b", published_v3()), ("v2-lite", published_v2_lite())])
def test_names_and_shapes_are_the_published_ones(name: str, published: dict[str, tuple[int, ...]]) -> None:
    listed = list(hf_tensors(preset(name)))
    assert len({tensor.name for tensor in listed}) == len(listed)
    assert {tensor.name: tensor.shape for tensor in listed} == published


def test_v3_has_as_many_parameters_as_published() -> None:
    config = preset("v3-671b")
    assert prediction_layers((tensor.name for tensor in hf_tensors(config)), config.num_hidden_layers) == 1
    main = list(hf_tensors(replace(config, num_nextn_predict_layers=0)))
    assert sum(tensor.numel for tensor in main) == 671_026_419_200
    assert [tensor.name for tensor in main if tensor.fp32] == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(3, 61)
    ]


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_the_logical_tensors_are_those_of_a_checkpoint(kind: str) -> None:
    for seed in range(8):
        config = random_config(seed, kind)
        assert not config.problems() and not export_problems(config)
        model = Transformer(config, LocalExchange(), device="meta")
        experts = local_experts(model)
        wanted = {
            piece.logical_name: piece.shape
            for name, parameter in model.named_parameters()
            for piece in pieces(name, tuple(parameter.shape), experts.get(name, ()))
        }
        if config.uses_bias:
            wanted |= {f"{layer}.mlp.gate.e_score_correction_bias": (config.n_routed_experts,)
                       for layer in config.moe_layers}  # fmt: skip
        found = logical_tensors(config)
        assert {one.name: one.shape for one in found} == wanted
        for one in found:  # the parts lie behind one another and fill it
            starts = [part.start for part in one.parts]
            sizes = [part.numel for part in one.parts]
            assert starts == [sum(sizes[:i]) for i in range(len(sizes))] and sum(sizes) == math.prod(one.shape)
        stacked = {name for fused in fused_tensors(config) for name in fused.experts}
        assert stacked == {name for name in wanted if ".mlp.experts." in name}


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_config_json_and_back(kind: str) -> None:
    for seed in range(20):
        config = random_config(seed, kind)
        table = to_hf(config, dtype="float32", bos_token_id=3, eos_token_id=3)
        problems: list[str] = []
        values = from_hf(table, problems)
        assert not problems
        assert parse(ModelConfig, values, "model", problems) == config and not problems


def test_the_fields_of_v3() -> None:
    table = to_hf(preset("v3-671b"), dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": False, "tie_word_embeddings": False, "ep_size": 1,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0,
    }  # fmt: skip
    assert {key: table[key] for key in published} == published
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
               "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    assert {key: table["rope_scaling"][key] for key in scaling} == scaling
    assert table["rope_parameters"]["rope_type"] == "yarn" and table["rope_parameters"]["rope_theta"] == 10000
    assert table["rope_interleave"] is True and table["dtype"] == "bfloat16"
    assert table["pad_token_id"] is None


def test_the_published_v2_lite_is_the_preset() -> None:
    scaling = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
               "original_max_position_embeddings": 4096, "type": "yarn"}  # fmt: skip
    table = {
        "model_type": "deepseek_v2", "aux_loss_alpha": 0.001, "attention_bias": False, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": scaling,
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    }  # fmt: skip
    problems: list[str] = []
    assert parse(ModelConfig, from_hf(table, problems), "model", problems) == preset("v2-lite")
    assert not problems


def test_yarn_without_a_factor_says_it() -> None:
    """transformers takes mscale = 0 for "not given" and would multiply by 0.1 ln(factor) + 1."""
    config = replace(random_config(0, "v3"), rope_scaling=YarnConfig(4.0, 64, mscale=0.0, mscale_all_dim=1.0))
    table = to_hf(config, dtype="float32", bos_token_id=0, eos_token_id=0)
    assert table["rope_parameters"]["attention_factor"] == pytest.approx(1 / (0.1 * math.log(4) + 1))


BAD_FIELDS = [
    ({"model_type": "mixtral"}, "grouped-query attention"),
    ({"model_type": "qwen3_moe"}, "grouped-query attention with normalised"),
    ({"model_type": "olmoe"}, "full attention"),
    ({"model_type": "gemma"}, "this import does not know it"),
    ({"model_type": "kimi_linear"}, "linear attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense"]}, "dense layers first"),
    ({"kv_lora_rank": ...}, "lacks kv_lora_rank"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"rope_interleave": False}, "rope_interleave = False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "YaRN only"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor"),
]


@pytest.mark.parametrize(("change", "said"), BAD_FIELDS)
def test_fields_that_the_model_has_not_are_refused(change: dict, said: str) -> None:
    config = replace(random_config(1, "v3"), num_attention_heads=2, rope_scaling=None)
    table = {**to_hf(config, dtype="float32", bos_token_id=0, eos_token_id=0), **change}
    problems: list[str] = []
    from_hf({key: value for key, value in table.items() if value is not ...}, problems)
    assert any(said in problem for problem in problems), problems


def test_what_no_reader_would_compute_alike_is_not_exported() -> None:
    v3, v2 = random_config(1, "v3"), random_config(1, "v2")
    for config, said in (
        (replace(v3, rms_norm_eps=1e-5), "model.rms_norm_eps = 1e-05"),
        (replace(v3, latent_norm_eps=1e-5), "model.latent_norm_eps = 1e-05"),
        (replace(v3, n_shared_experts=0), "n_shared_experts"),
        (replace(v3, topk_method="group_limited_greedy", n_group=4, topk_group=2), "topk_method"),
        (replace(v3, n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1), "needs 2 experts"),
        (replace(v2, norm_topk_prob=True), "norm_topk_prob"),
        (replace(v2, kv_lora_rank=5), "kv_lora_rank = 5 is odd"),
        (replace(v2, hidden_size=50, num_attention_heads=4), "hidden_size = 50"),
    ):
        (problem,) = export_problems(config)
        assert said in problem
    assert from_tables({}).model and not export_problems(from_tables({}).model)


def test_fp8_blocks_one_number_at_a_time() -> None:
    """Against the definition: element (i, j) is its value times the scale of block (i // a, j // b)."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, block in ((5, 7, (2, 3)), (256, 130, (128, 128)), (1, 1, (128, 128)), (128, 128, (128, 128))):
        values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        shape = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        assert scale_shape((rows, columns), block) == shape
        scales = torch.rand(shape, generator=generator) + 0.5
        found = dequantise(values, scales, block)
        plain, told = values.float().tolist(), scales.tolist()
        for i in range(0, rows, 3):
            for j in range(0, columns, 5):
                wanted = torch.tensor(plain[i][j]) * torch.tensor(told[i // block[0]][j // block[1]])
                assert found[i, j] == wanted
