"""Parameters and floating-point operations of a configuration, by formula; nothing is built."""

# S seq, D hidden, E routed experts, K top-k, H heads

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters. The balancing biases are buffers: counted in `bias` and nowhere else.

    DeepSeek's published 671,026,419,200 is `main` plus the biases of the main layers.
    """

    embedding: int  # not a product: a row is looked up
    head: int
    main_layers: int  # decoder layers and final normalisation
    mtp: int  # prediction modules; embedding and head are shared
    expert: int  # one routed expert
    n_moe_main: int  # main layers with experts
    n_mtp: int
    idle_experts: int  # E - K: experts of a layer that a token does not use
    bias: int  # E for each layer with experts, modules included

    @property
    def main(self) -> int:
        """Without prediction modules."""
        return self.embedding + self.head + self.main_layers

    @property
    def total(self) -> int:
        """All parameters, prediction modules included."""
        return self.main + self.mtp

    @property
    def active(self) -> int:
        """Parameters that one token uses, without prediction modules; embedding and head counted whole."""
        return self.main - self.n_moe_main * self.idle_experts * self.expert

    @property
    def active_mtp(self) -> int:
        """Parameters of the prediction modules that one token uses."""
        return self.mtp - self.n_mtp * self.idle_experts * self.expert


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count by formula; equal to the sum over a built model's parameters."""
    hidden, moe = config.hidden_size, config.moe_intermediate_size
    n_moe = config.num_hidden_layers - config.first_k_dense_replace
    norms = 2 * hidden
    expert = 3 * hidden * moe
    dense_layer = _attention_parameters(config) + norms + 3 * hidden * config.intermediate_size
    routed = config.n_routed_experts * (hidden + expert)  # one row of the gate for each expert
    moe_layer = _attention_parameters(config) + norms + routed + config.n_shared_experts * expert
    module = 3 * hidden + 2 * hidden * hidden + moe_layer
    n_mtp = config.num_nextn_predict_layers
    return ParameterCount(
        embedding=config.vocab_size * hidden,
        head=config.vocab_size * hidden,
        main_layers=config.first_k_dense_replace * dense_layer + n_moe * moe_layer + hidden,
        mtp=n_mtp * module,
        expert=expert,
        n_moe_main=n_moe,
        n_mtp=n_mtp,
        idle_experts=config.n_routed_experts - config.num_experts_per_tok,
        bias=(n_moe + n_mtp) * config.n_routed_experts,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one token's forward and backward in training, for model FLOPs utilisation (MFU).

    6 for each parameter of a matrix that the token is multiplied by (2 forward, 4 backward; the embedding is a look-up
    and does not count, nor do normalisations), plus attention: 6 * context * H * (qk_head_dim + v_head_dim) for each
    layer, where the causal context is (S + 1) / 2 on average. A prediction module k sees S - k of the S positions, and
    the head once more for each. Work that an implementation adds (recomputation, padded values) does not count.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with attention counted causally.

    Args:
        seq_len: S, tokens of a sequence, taken as one document.
    """
    counts = count_parameters(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    low_rank = (config.q_lora_rank or 0) + config.kv_lora_rank
    norms = layers * (2 * hidden + low_rank) + hidden
    products = counts.active - counts.embedding - norms
    total = 6.0 * products + layers * _attention_flops(config, seq_len)
    if counts.n_mtp:
        module = counts.active_mtp // counts.n_mtp - (5 * hidden + low_rank)
        for k in range(1, counts.n_mtp + 1):
            positions = max(seq_len - k, 0)
            each = 6.0 * (module + counts.head) + _attention_flops(config, positions)
            total += each * positions / seq_len
    return total


def _attention_flops(config: ModelConfig, seq_len: int) -> float:
    context = (seq_len + 1) / 2
    return 6.0 * context * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)


def _attention_parameters(config: ModelConfig) -> int:
    hidden, heads, kv_rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = hidden * heads * config.qk_head_dim
    if config.q_lora_rank is not None:
        queries = config.q_lora_rank * (hidden + 1 + heads * config.qk_head_dim)
    keys_values = hidden * (kv_rank + config.qk_rope_head_dim) + kv_rank
    expanded = kv_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return queries + keys_values + expanded + heads * config.v_head_dim * hidden
