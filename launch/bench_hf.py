"""Our model's dimensions and weights as `transformers` wants them, so that a peer computes the same function."""

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.transformer import Transformer


def hf_config(config: ModelConfig, experts: str) -> Any:
    """A transformers DeepseekV3Config of the same dimensions, without multi-token prediction.

    Args:
        experts: `eager` (a loop over experts) or `grouped_mm`.
    """
    from transformers import DeepseekV3Config

    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "intermediate_size",
        "moe_intermediate_size", "first_k_dense_replace", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps",
        "initializer_range", "tie_word_embeddings",
    )  # fmt: skip
    made = DeepseekV3Config(
        **{name: getattr(config, name) for name in names},
        num_nextn_predict_layers=0, num_key_value_heads=config.num_attention_heads, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    made._experts_implementation = experts
    made._attn_implementation = "sdpa"
    return made


def hf_model(config: ModelConfig, experts: str, seed: int) -> Any:
    """A DeepseekV3ForCausalLM with the weights that `init_weights` gives ours, in fp32, ready to train."""
    from transformers import DeepseekV3ForCausalLM

    made = DeepseekV3ForCausalLM(hf_config(config, experts)).float()
    missing = made.load_state_dict(hf_weights(config, seed), strict=False)
    left_out = [name for name in missing.missing_keys if "e_score_correction_bias" not in name]
    if left_out or missing.unexpected_keys:
        raise ValueError(f"transformers' model wants {left_out} and does not know {missing.unexpected_keys}")
    return made.train()


def hf_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Every weight under transformers' name; ours are the same but for the prefix."""
    ours = Transformer(config, LocalExchange())
    with torch.no_grad():
        init_weights(ours, seed)
    return {
        name if name.startswith("lm_head.") else f"model.{name}": value.detach()
        for name, value in ours.state_dict().items()
    }
