"""What single readers of an exported folder cannot do with a model, or need to be told: a sentence each."""

import json

from data.tokenizer import DEEPSEEK, Tokenizer
from model.config import ModelConfig
from model.hf_config import LATENT_EPS, model_type

MLA_WIDTH = (
    576  # kv_lora_rank + qk_rope_head_dim that vLLM 0.32's kernels for multi-head latent attention are built for
)
_DEEPSEEK_SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"  # of DeepSeek-V3's tokenizer.json
_LLAMA_CPP_LITE = (26, 27, 48)  # depths at which llama.cpp's deepseek2 reads queries without compression


def reader_notes(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """Notes on vLLM, llama.cpp and transformers for a model's shape and tokenizer.

    Source: vLLM 0.32.0 (MLACommonBackend), llama.cpp as in llama-cpp-python 0.3.36, transformers 4.57.6 and 5.3.0.
    """
    return [*_vllm(config), *_llama_cpp(config, tokenizer), *_transformers(config)]


def _vllm(config: ModelConfig) -> list[str]:
    found = []
    width = config.kv_lora_rank + config.qk_rope_head_dim
    if width != MLA_WIDTH:
        found.append(
            f"vLLM: kv_lora_rank + qk_rope_head_dim = {config.kv_lora_rank} + {config.qk_rope_head_dim} = {width}, "
            f"and its kernels for latent attention take {MLA_WIDTH} only; serve it with VLLM_MLA_DISABLE=1 in the "
            "environment"
        )
    if config.rms_norm_eps != LATENT_EPS:
        found.append(
            f"vLLM: it normalises the latents with rms_norm_eps = {config.rms_norm_eps}, this model and transformers "
            "with 1e-6; its figures differ a little"
        )
    return found


def _llama_cpp(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    found = []
    table = json.loads(tokenizer.to_json()).get("model", {})
    if not table.get("merges"):
        found.append(
            f"llama.cpp: it does not read a vocabulary without merges, as the tokenizer {tokenizer.spec} is; train "
            "with bpe:N or deepseek to go there"
        )
    elif tokenizer.spec != DEEPSEEK and tokenizer.fingerprint != _DEEPSEEK_SHA256:
        found.append(
            f"llama.cpp: its converter knows published tokenizers only, by a checksum; {tokenizer.spec} needs a line "
            "in get_vocab_base_pre unless it is one of them (docs/huggingface.md, Traps)"
        )
    if config.q_lora_rank is None and config.num_hidden_layers not in _LLAMA_CPP_LITE:
        found.append(
            f"llama.cpp: q_lora_rank = null is read for {', '.join(map(str, _LLAMA_CPP_LITE))} layers only, and this "
            f"model has {config.num_hidden_layers}; the converted file does not load"
        )
    if config.scoring_func == "softmax" and config.limits_groups:
        found.append(
            f'llama.cpp: topk_method = "group_limited_greedy" (n_group = {config.n_group}, topk_group = '
            f"{config.topk_group}) is computed without groups there; its figures differ (2e-2 in log-probabilities)"
        )
    yarn = config.rope_scaling
    if yarn is not None and yarn.factor > 1 and yarn.mscale != yarn.mscale_all_dim:
        found.append(
            f"llama.cpp: YaRN with mscale = {yarn.mscale} and mscale_all_dim = {yarn.mscale_all_dim} is computed as if "
            "both were equal; its figures differ (5e-2 to 2e-1 in log-probabilities)"
        )
    return found


def _transformers(config: ModelConfig) -> list[str]:
    if model_type(config) != "deepseek_v2":
        return []
    found = []
    yarn = config.rope_scaling
    if yarn is not None and yarn.factor > 1 and yarn.mscale_all_dim:
        found.append(
            f"transformers: versions before the mend of July 2026 (4.57.6 and 5.3.0 were tried) leave mscale_all_dim = "
            f"{yarn.mscale_all_dim} out of deepseek_v2's attention and compute another function; take 5.23 or later"
        )
    if config.limits_groups:
        found.append("transformers: 5.3.0 fails on deepseek_v2 with groups of experts; take 5.23 or later")
    return found
