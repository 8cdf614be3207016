"""The model's configuration: names and meaning as in Hugging Face's DeepseekV3Config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class YarnConfig:
    """YaRN scaling of the rotary frequencies (arXiv 2309.00071), names as in DeepSeek's `rope_scaling`.

    Args:
        factor: how many times longer than `original_max_position_embeddings` the context is to be, >= 1.
        original_max_position_embeddings: context length (tokens) before scaling.
        beta_fast, beta_slow: turns within the original context above which a frequency keeps its value, and below
            which it is divided by `factor`; between them it is blended. Equal values make a step (Kimi-K2).
        mscale, mscale_all_dim: attention temperature; the softmax scale is multiplied by
            (0.1 * mscale_all_dim * ln(factor) + 1)^2, cos and sin by the ratio of the two. 0 leaves it alone.
    """

    factor: Annotated[float, "[1, 1e6]"] = 40.0
    original_max_position_embeddings: Annotated[int, "[1, 1e9]"] = 4096
    beta_fast: Annotated[float, "(0, 1e6]"] = 32.0
    beta_slow: Annotated[float, "(0, 1e6]"] = 1.0
    mscale: Annotated[float, "[0, 1000]"] = 1.0
    mscale_all_dim: Annotated[float, "[0, 1000]"] = 1.0

    def problems(self) -> list[str]:
        """Every violated rule, each with its key and a way out."""
        found = []
        if self.factor < 1:
            found.append(f"model.rope_scaling.factor = {self.factor} is below 1; use 1 or more")
        if self.original_max_position_embeddings < 1:
            found.append(
                f"model.rope_scaling.original_max_position_embeddings = {self.original_max_position_embeddings} "
                "must be at least 1 token"
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            found.append(
                f"model.rope_scaling.beta_slow = {self.beta_slow} must be above 0 and at most beta_fast = "
                f"{self.beta_fast}; DeepSeek uses 1 and 32, Kimi-K2 1 and 1"
            )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                found.append(f"model.rope_scaling.{name} = {getattr(self, name)} is negative; use 0 for no scaling")
        return found


_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and rules of one model; the defaults are those of the preset `debug`, but for uncompressed queries
    (TOML has no null: absent must mean None) and the initial spread.

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: decoder layers; the first `first_k_dense_replace` have a dense feed-forward.
        num_nextn_predict_layers: multi-token prediction modules, 0 for none.
        q_lora_rank: rank of the queries' compression; None (or absent) for a full query projection.
        num_attention_heads: attention heads of a layer.
        kv_lora_rank: rank of the keys' and values' joint compression.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: a head's widths: keys without and with rotation, values.
        max_position_embeddings: longest context in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN, or None for plain rotary embedding.
        intermediate_size, moe_intermediate_size: width of a dense feed-forward, and of one expert.
        first_k_dense_replace: layers at the start with a dense feed-forward instead of experts.
        n_routed_experts: E, routed experts of a layer.
        num_experts_per_tok: K, routed experts that a token chooses.
        n_shared_experts: experts that see every token, computed as one feed-forward of n times the width; 0 for none.
        n_group, topk_group: routed experts in n_group equal groups; a token may choose inside the best topk_group.
        scoring_func: sigmoid (DeepSeek-V3) or softmax (V2).
        topk_method: `noaux_tc` adds the balancing bias to the scores and ranks a group by its two best;
            `group_limited_greedy` ranks it by its best, without bias; `greedy` ignores groups (V2-Lite).
        norm_topk_prob: divide the chosen weights by their sum.
        routed_scaling_factor: factor on the chosen weights.
        rms_norm_eps: what every normalisation adds to the mean square.
        latent_norm_eps: the same for the latents of attention alone; None (or absent) takes `rms_norm_eps`. Published
            models whose rms_norm_eps is not 1e-6 (Moonlight, GLM-4.7-Flash) have 1e-6 here.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: false; an output layer that shares the embedding is not part of DeepSeek-V3's shape.
    """

    vocab_size: Annotated[int, "[1, 1e8]"] = 4096
    hidden_size: Annotated[int, "[1, 1e6]"] = 192
    num_hidden_layers: Annotated[int, "[1, 10000]"] = 4
    num_nextn_predict_layers: Annotated[int, "[0, 100]"] = 1

    num_attention_heads: Annotated[int, "[1, 100000]"] = 4
    q_lora_rank: Annotated[int | None, "[1, 1e6]"] = None
    kv_lora_rank: Annotated[int, "[1, 1e6]"] = 64
    qk_nope_head_dim: Annotated[int, "[1, 100000]"] = 16
    qk_rope_head_dim: Annotated[int, "[1, 100000]"] = 16
    v_head_dim: Annotated[int, "[1, 100000]"] = 32
    max_position_embeddings: Annotated[int, "[1, 1e9]"] = 4096
    rope_theta: Annotated[float, "(0, 1e12]"] = 10000.0
    rope_scaling: YarnConfig | None = None

    intermediate_size: Annotated[int, "[1, 1e7]"] = 512
    moe_intermediate_size: Annotated[int, "[1, 1e7]"] = 64
    first_k_dense_replace: Annotated[int, "[0, 10000]"] = 1
    n_routed_experts: Annotated[int, "[1, 100000]"] = 16
    n_shared_experts: Annotated[int, "[0, 1000]"] = 1
    num_experts_per_tok: Annotated[int, "[1, 100000]"] = 4
    n_group: Annotated[int, "[1, 100000]"] = 4
    topk_group: Annotated[int, "[1, 100000]"] = 2
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: Annotated[float, "(0, 10000]"] = 2.5

    rms_norm_eps: Annotated[float, "[1e-20, 1]"] = 1e-6
    latent_norm_eps: Annotated[float | None, "[1e-20, 1]"] = None
    initializer_range: Annotated[float, "(0, 10]"] = 0.02
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from plain values, as a TOML section or a part of a config.json holds them.

        Args:
            values: field names to values; `rope_scaling` may be a mapping, a YarnConfig or None.

        Raises:
            TypeError: a key that is no field of this class.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise TypeError(f"model: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        plain = dict(values)
        scaling = plain.get("rope_scaling")
        if isinstance(scaling, Mapping):
            plain["rope_scaling"] = YarnConfig(**scaling)
        return cls(**plain)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query's and a key's head, rotated part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_eps(self) -> float:
        """What the normalisation of the latents adds to the mean square."""
        return self.rms_norm_eps if self.latent_norm_eps is None else self.latent_norm_eps

    @property
    def uses_bias(self) -> bool:
        """Whether the balancing bias takes part in the choice of experts."""
        return self.topk_method == "noaux_tc"

    @property
    def limits_groups(self) -> bool:
        """Whether a token may only choose inside its best groups of experts."""
        return self.topk_method != "greedy" and self.topk_group < self.n_group

    @property
    def moe_layers(self) -> tuple[str, ...]:
        """Module paths of the layers with routed experts, in the order of the routing statistics' rows."""
        main = tuple(f"layers.{i}" for i in range(self.first_k_dense_replace, self.num_hidden_layers))
        return main + tuple(f"mtp.{k}.block" for k in range(self.num_nextn_predict_layers))

    def problems(self) -> list[str]:
        """Every violated rule, each starting with its dotted key and naming a way out."""
        found = self._range_problems()
        if not found:  # the rules below divide and compare numbers that must first be in range
            found = self._attention_problems() + self._expert_problems()
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems()
        return found

    def _range_problems(self) -> list[str]:
        found = []
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                found.append(f"model.{name} = {getattr(self, name)} must be at least 1")
        for name in ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                found.append(f"model.{name} = {getattr(self, name)} is negative; use 0 for none")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            found.append(f"model.q_lora_rank = {self.q_lora_rank} must be at least 1; leave it out for full queries")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            if not getattr(self, name) > 0:
                found.append(f"model.{name} = {getattr(self, name)} must be above 0")
        if self.latent_norm_eps is not None and not self.latent_norm_eps > 0:
            found.append(
                f"model.latent_norm_eps = {self.latent_norm_eps} must be above 0; leave it out to take rms_norm_eps"
            )
        if self.tie_word_embeddings:
            found.append("model.tie_word_embeddings = true is not part of DeepSeek-V3's shape; use false")
        return found

    def _attention_problems(self) -> list[str]:
        found = []
        if self.qk_rope_head_dim % 2:
            found.append(
                f"model.qk_rope_head_dim = {self.qk_rope_head_dim} is odd, but rotation works on pairs; "
                f"use {self.qk_rope_head_dim - 1 or 2} or {self.qk_rope_head_dim + 1}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            found.append(
                f"model.first_k_dense_replace = {self.first_k_dense_replace} exceeds num_hidden_layers = "
                f"{self.num_hidden_layers}; use at most {self.num_hidden_layers}"
            )
        yarn = self.rope_scaling
        if yarn is not None and yarn.original_max_position_embeddings > self.max_position_embeddings:
            found.append(
                f"model.rope_scaling.original_max_position_embeddings = {yarn.original_max_position_embeddings} "
                f"exceeds max_position_embeddings = {self.max_position_embeddings}; raise the latter, or leave "
                "rope_scaling out"
            )
        return found

    def _expert_problems(self) -> list[str]:
        found = []
        experts, groups, top_k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if self.topk_method == "noaux_tc" and self.scoring_func != "sigmoid":
            found.append(
                f"model.topk_method = noaux_tc needs scoring_func = sigmoid, not {self.scoring_func}; "
                "with softmax use group_limited_greedy or greedy"
            )
        if self.topk_method == "greedy":
            if top_k > experts:
                found.append(
                    f"model.num_experts_per_tok = {top_k} exceeds n_routed_experts = {experts}; use at most {experts}"
                )
            if groups != 1 or self.topk_group != 1:
                found.append(
                    f"model.n_group = {groups}, topk_group = {self.topk_group} have no effect with topk_method = "
                    "greedy; use 1 and 1, or topk_method = group_limited_greedy"
                )
            return found
        if experts % groups:
            divisors = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            found.append(
                f"model.n_group = {groups} does not divide n_routed_experts = {experts} into equal groups; "
                f"use one of {divisors}"
            )
        if self.topk_group > groups:
            found.append(f"model.topk_group = {self.topk_group} exceeds n_group = {groups}; use at most {groups}")
        if found:
            return found
        size = experts // groups
        offered = self.topk_group * size
        if top_k > offered:
            found.append(
                f"model.num_experts_per_tok = {top_k} exceeds the {offered} experts that topk_group = "
                f"{self.topk_group} groups of {size} offer; use at most {offered}"
            )
        if self.uses_bias and groups > 1 and size < 2:
            found.append(
                f"model.n_group = {groups} leaves {size} expert in a group, but noaux_tc ranks a group by its two "
                "best; use groups of at least 2 experts"
            )
        return found
