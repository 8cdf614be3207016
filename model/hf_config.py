"""Our model's configuration as a Hugging Face config.json, and back: pure, nothing is read or built.

The fields are those that `transformers` (4.57 and 5), vLLM and SGLang read; where they disagree on a name, both names
are written. A configuration that one of them would compute differently is refused rather than written. Versions
matter: transformers 4.57 and 5.3 leave YaRN's factor out of deepseek_v2's attention (docs/huggingface.md, Traps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig, YarnConfig
from model.positions import yarn_magnitude

_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_nextn_predict_layers", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rope_theta",
    "intermediate_size", "moe_intermediate_size", "first_k_dense_replace", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor",
    "rms_norm_eps", "initializer_range", "tie_word_embeddings",
)  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "intermediate_size",
    "moe_intermediate_size", "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
)  # fmt: skip
LATENT_EPS = 1e-6  # DeepSeek's code and transformers normalise the latents with it, whatever rms_norm_eps says
# What a field is where config.json does not have it: the defaults of the classes that DeepSeek, Moonshot and
# transformers read these files with. None: there is no default that two of them share, and the field is asked for.
_V3: dict[str, Any] = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0, "rms_norm_eps": LATENT_EPS,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "glm4_moe_lite": {**_V3, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
    "deepseek_v2": {
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "n_group": None, "topk_group": None, "num_nextn_predict_layers": 0, "rms_norm_eps": LATENT_EPS,
    },
}  # fmt: skip
_OTHERS = {
    "mixtral": "grouped-query attention, and no shared expert",
    "qwen2_moe": "grouped-query attention with biases, and a gated shared expert",
    "qwen3_moe": "grouped-query attention with normalised queries and keys, and no shared expert",
    "olmoe": "full attention with normalised queries and keys, and no shared expert",
    "deepseek": "multi-head attention without a latent",
    "deepseek_v32": "sparse attention with an indexer",
    "glm4_moe": "grouped-query attention, part of each head rotated",
    "kimi_linear": "linear attention in most layers",
    "kimi_vl": "a model of images and text; take its language model's own folder",
    "kimi_k25": "a model of images and text; take its language model's own folder",
}
# What has to have one value, because the model has nothing else.
_FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "partial_rotary_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip


def model_type(config: ModelConfig) -> str:
    """deepseek_v3 where scores are sigmoids, deepseek_v2 where they are softmax."""
    return "deepseek_v3" if config.scoring_func == "sigmoid" else "deepseek_v2"


def export_problems(config: ModelConfig) -> list[str]:
    """Why a reader of the folder would not compute the same function: a sentence each, with a way out."""
    found = []
    if config.latent_eps != LATENT_EPS:
        key = "rms_norm_eps" if config.latent_norm_eps is None else "latent_norm_eps"
        found.append(
            f"model.{key} = {config.latent_eps}: transformers and DeepSeek's code normalise the latents with 1e-6 "
            "always; only a model trained with model.latent_norm_eps = 1e-6 is the same there"
        )
    if config.n_shared_experts < 1:
        found.append("model.n_shared_experts = 0: transformers and vLLM always build a shared expert; train with 1")
    if config.scoring_func == "sigmoid":
        if config.topk_method == "group_limited_greedy" and config.limits_groups:
            found.append(
                'model.topk_method = "group_limited_greedy" with sigmoid scores ranks a group by its best expert, '
                'DeepseekV3 by its two best; train with "noaux_tc" (balance.rule = "none" leaves the bias at zero)'
            )
        if config.n_routed_experts // config.n_group < 2:
            found.append(
                f"model.n_routed_experts = {config.n_routed_experts} in n_group = {config.n_group}: transformers takes "
                "the two best of each group; a group needs 2 experts"
            )
        return found
    if config.norm_topk_prob:
        found.append(
            "model.norm_topk_prob = true with softmax scores: transformers' DeepseekV2 does not divide by the sum, "
            "vLLM does; train with norm_topk_prob = false, or with sigmoid scores"
        )
    for name in ("qk_nope_head_dim", "kv_lora_rank"):
        if getattr(config, name) % 2:
            found.append(
                f"model.{name} = {getattr(config, name)} is odd: transformers' DeepseekV2 takes the rotated numbers "
                "behind it for complex ones, which must lie at even places"
            )
    if config.hidden_size % config.num_attention_heads:
        found.append(
            f"model.hidden_size = {config.hidden_size} is not a multiple of num_attention_heads = "
            f"{config.num_attention_heads}, which transformers' DeepseekV2 demands although nothing depends on it"
        )
    return found


def readable_positions(config: ModelConfig) -> int:
    """Positions that every reader of the folder can go to.

    vLLM's table of YaRN's angles has factor * original_max_position_embeddings rows, and its engine dies behind them.
    """
    yarn, longest = config.rope_scaling, config.max_position_embeddings
    return longest if yarn is None else min(longest, int(yarn.factor * yarn.original_max_position_embeddings))


def to_hf(config: ModelConfig, *, dtype: str, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """The contents of config.json.

    pad_token_id stays null: transformers gives the embedding of a padding token no gradient, and ours is the end of a
    document.

    Args:
        dtype: "bfloat16" or "float32", of the folder's weights.
        bos_token_id, eos_token_id: what starts and ends a text.
    """
    kind = model_type(config)
    theta = {"rope_theta": config.rope_theta}
    yarn = _yarn_to_hf(config.rope_scaling) if config.rope_scaling else None
    return {
        "architectures": ["DeepseekV3ForCausalLM" if kind == "deepseek_v3" else "DeepseekV2ForCausalLM"],
        "model_type": kind,
        **{name: getattr(config, name) for name in _SAME},
        "topk_method": "noaux_tc" if kind == "deepseek_v3" else config.topk_method,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if yarn is None else {"type": "yarn", **yarn},
        "rope_parameters": {"rope_type": "default", **theta} if yarn is None else {**yarn, **theta},
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    written = {
        "rope_type": "yarn",
        "factor": float(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": float(yarn.beta_fast),
        "beta_slow": float(yarn.beta_slow),
        "mscale": float(yarn.mscale),
        "mscale_all_dim": float(yarn.mscale_all_dim),
    }
    if not (yarn.mscale and yarn.mscale_all_dim):
        # transformers takes a zero for "not given" and would choose a factor of its own
        written["attention_factor"] = yarn_magnitude(yarn)
    return written


def from_hf(table: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Values for a ModelConfig out of a config.json; their types are not checked.

    Args:
        problems: every field that is missing or asks for what the model has not is appended, as a sentence.
    """
    kind = table.get("model_type")
    if kind not in _MODELS:
        problems.append(
            f"model_type = {kind!r} cannot be imported: {_OTHERS.get(str(kind), 'this import does not know it')}; the "
            f"model here is multi-head latent attention with shared and routed experts, read from {', '.join(_MODELS)}"
        )
        return {}
    given = {**table, **_dense_layers(kind, table, problems)}
    values = {**_MODELS[kind], **{name: given[name] for name in _SAME if name in given}}
    if given.get("topk_method") is not None:
        values["topk_method"] = given["topk_method"]
    missing = [name for name in _REQUIRED if name not in given]
    for name in ("n_group", "topk_group"):
        if values["topk_method"] == "greedy":
            values[name] = 1  # groups play no part
        elif values[name] is None:
            missing.append(name)
    if missing:
        problems.append(f"lacks {', '.join(missing)}; take the config.json that belongs to the weights")
    for name in ("n_shared_experts", "num_nextn_predict_layers"):
        if values.get(name, 0) is None:
            values[name] = 0
    wanted = {"scoring_func": _MODELS[kind]["scoring_func"]}
    if kind != "deepseek_v2":
        wanted["topk_method"] = "noaux_tc"
    for name, value in wanted.items():
        if values[name] != value:
            problems.append(f"{name} = {values[name]!r}: {kind} is imported with {value!r} only")
    for name, value in _FIXED.items():
        if table.get(name, value) not in (value, None):
            problems.append(f"{name} = {table[name]!r}: the model has only {value!r}")
    heads = table.get("num_key_value_heads")
    if heads is not None and heads != table.get("num_attention_heads"):
        problems.append(
            f"num_key_value_heads = {heads!r}: all {table.get('num_attention_heads')!r} heads have keys of their own"
        )
    if kind == "deepseek_v2" and values["norm_topk_prob"]:
        problems.append("norm_topk_prob = true: readers of deepseek_v2 disagree on what that is, none is right here")
    if values["rms_norm_eps"] != LATENT_EPS:
        values["latent_norm_eps"] = LATENT_EPS
    values |= _rope_from_hf(table, problems)
    return values


def prediction_layer_problem(table: Mapping[str, Any], found: int) -> str | None:
    """Why config.json and the weights do not agree on the prediction layers; None where they do.

    Args:
        found: prediction layers that the weights hold. None at all is no disagreement: transformers does not save them.
    """
    told = table.get("num_nextn_predict_layers", "missing")
    number = told if isinstance(told, int) else 0
    if not found or found == number:
        return None
    first, shown = table.get("num_hidden_layers"), "null" if told is None else told
    return (
        f"num_nextn_predict_layers is {shown}, and the weights hold {found} prediction layer(s), from layer {first} on "
        f"(eh_proj, enorm and hnorm belong to one); set num_nextn_predict_layers = {found} in config.json"
    )


def _dense_layers(kind: str, table: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """first_k_dense_replace of glm4_moe_lite, which says it as `mlp_layer_types`: layer by layer, dense or sparse."""
    if kind != "glm4_moe_lite":
        return {}
    kinds, told, layers = (
        table.get("mlp_layer_types"),
        table.get("first_k_dense_replace"),
        table.get("num_hidden_layers"),
    )
    if kinds is None:
        return {"first_k_dense_replace": 1 if told is None else told}
    dense = kinds.count("dense") if isinstance(kinds, list) else -1
    if dense < 0 or kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense) or len(kinds) != layers:
        problems.append(f"mlp_layer_types = {kinds!r}: the model has dense layers first, then sparse, {layers} in all")
    elif told not in (None, dense):
        problems.append(f"first_k_dense_replace = {told!r}, and mlp_layer_types has {dense} dense layers; keep one")
    return {"first_k_dense_replace": dense}


def _rope_from_hf(table: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """rope_theta and rope_scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    new, old = table.get("rope_parameters"), table.get("rope_scaling")
    told = {**(old if isinstance(old, Mapping) else {}), **(new if isinstance(new, Mapping) else {})}
    theta = told.get("rope_theta", table.get("rope_theta", 10000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    if kind in ("default", None):
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn" or not told.get("truncate", True):
        problems.append(f"rope_scaling {dict(told)!r}: the model has plain rotary embedding and DeepSeek's YaRN only")
        return {"rope_theta": theta, "rope_scaling": None}
    plain = {
        name: told[name]
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        if told.get(name) is not None
    }
    for name in ("factor", "original_max_position_embeddings"):
        if name not in plain:
            problems.append(f"rope_scaling lacks {name}")
    # What DeepSeek's code assumes where they are absent; not this project's defaults.
    scaling = {"mscale": 1.0, "mscale_all_dim": 0.0, **plain}
    scaling |= {name: told[name] for name in ("mscale", "mscale_all_dim") if told.get(name) is not None}
    factor = told.get("attention_factor")
    if factor is not None and all(isinstance(value, int | float) for value in (factor, *scaling.values())):
        ours = yarn_magnitude(YarnConfig(**scaling))
        if abs(ours - factor) > 1e-6 * abs(factor):
            problems.append(
                f"rope_scaling.attention_factor = {factor!r} is not the {ours:.6f} that mscale and mscale_all_dim give"
            )
    return {"rope_theta": theta, "rope_scaling": scaling}
