"""Our tensors under the names of a Hugging Face DeepSeek folder: pure arithmetic on names and shapes.

    ours (logical names)                        in the folder
    embed_tokens.weight                         model.embed_tokens.weight
    layers.3.self_attn.o_proj.weight            model.layers.3.self_attn.o_proj.weight
    layers.3.mlp.experts.17.gate_up_proj        model.layers.3.mlp.experts.17.gate_proj.weight, .up_proj.weight
    layers.3.mlp.experts.17.down_proj           model.layers.3.mlp.experts.17.down_proj.weight
    norm.weight, lm_head.weight                 model.norm.weight, lm_head.weight
    mtp.0.enorm.weight                          model.layers.61.enorm.weight          (61 = num_hidden_layers)
    mtp.0.block.self_attn.o_proj.weight         model.layers.61.self_attn.o_proj.weight
    mtp.0.norm.weight                           model.layers.61.shared_head.norm.weight
    (the model's own embedding and head)        model.layers.61.embed_tokens.weight, .shared_head.head.weight

Source: the index files of the published DeepSeek-V3 and DeepSeek-V2-Lite.
"""

# V vocabulary, D hidden, H heads, E routed experts, I expert width

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from model.config import ModelConfig

_Shape = tuple[int, ...]


class HfTensor(NamedTuple):
    """One tensor of the folder.

    source, start: it is the elements from `start` on of our flattened logical tensor; "" for one that is all zeros.
    fp32: it stays in fp32 whatever the folder's dtype.
    copy_of: the name of the tensor that it repeats, "" for none; such a one may be missing.
    """

    name: str
    shape: _Shape
    source: str
    start: int = 0
    fp32: bool = False
    copy_of: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Logical(NamedTuple):
    """One tensor of ours, and the tensors of the folder that it is made of, stacked by rows."""

    name: str
    shape: _Shape
    parts: tuple[HfTensor, ...]


class Fused(NamedTuple):
    """All experts of a layer as one tensor (E, rows, columns), as `transformers` 5 keeps them in memory.

    experts: our logical tensors, by expert.
    """

    name: str
    shape: _Shape
    experts: tuple[str, ...]


def hf_tensors(config: ModelConfig) -> Iterator[HfTensor]:
    """Every tensor of the folder, experts one by one, in the order in which it is written."""
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = HfTensor("model.embed_tokens.weight", (vocab, hidden), "embed_tokens.weight")
    head = HfTensor("lm_head.weight", (vocab, hidden), "lm_head.weight")
    yield embedding
    for layer in range(config.num_hidden_layers):
        dense = layer < config.first_k_dense_replace
        yield from _block(config, f"model.layers.{layer}", f"layers.{layer}", dense)
    yield HfTensor("model.norm.weight", (hidden,), "norm.weight")
    yield head
    for k in range(config.num_nextn_predict_layers):
        theirs, ours = f"model.layers.{config.num_hidden_layers + k}", f"mtp.{k}"
        yield embedding._replace(name=f"{theirs}.embed_tokens.weight", copy_of=embedding.name)
        for name in ("enorm", "hnorm"):
            yield HfTensor(f"{theirs}.{name}.weight", (hidden,), f"{ours}.{name}.weight")
        yield HfTensor(f"{theirs}.eh_proj.weight", (hidden, 2 * hidden), f"{ours}.eh_proj.weight")
        yield from _block(config, theirs, f"{ours}.block", dense=False)
        yield HfTensor(f"{theirs}.shared_head.norm.weight", (hidden,), f"{ours}.norm.weight")
        yield head._replace(name=f"{theirs}.shared_head.head.weight", copy_of=head.name)


def logical_tensors(config: ModelConfig) -> list[Logical]:
    """Every tensor of ours (the balancing biases too) with its parts, in the folder's order."""
    parts: dict[str, list[HfTensor]] = {}
    for tensor in hf_tensors(config):
        if tensor.source and not tensor.copy_of:
            parts.setdefault(tensor.source, []).append(tensor)
    return [
        Logical(name, (sum(part.shape[0] for part in found), *found[0].shape[1:]), tuple(found))
        for name, found in parts.items()
    ]


def fused_tensors(config: ModelConfig) -> list[Fused]:
    """The two stacked tensors of each layer with experts that a folder may hold instead of single ones."""
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    found = []
    for theirs, ours in _moe_layers(config):
        for leaf, shape in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
            names = tuple(f"{ours}.mlp.experts.{expert}.{leaf}" for expert in range(experts))
            found.append(Fused(f"{theirs}.mlp.experts.{leaf}", (experts, *shape), names))
    return found


def prediction_layers(names: Iterable[str], num_hidden_layers: int) -> int:
    """How many prediction layers a folder's tensors belong to: those that number num_hidden_layers and above count."""
    found = set()
    for name in names:
        stem, _, rest = name.partition("model.layers.")
        number = rest.partition(".")[0]
        if not stem and number.isdecimal() and int(number) >= num_hidden_layers:
            found.add(int(number))
    return len(found)


def _moe_layers(config: ModelConfig) -> Iterator[tuple[str, str]]:
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        yield f"model.layers.{layer}", f"layers.{layer}"
    for k in range(config.num_nextn_predict_layers):
        yield f"model.layers.{config.num_hidden_layers + k}", f"mtp.{k}.block"


def _block(config: ModelConfig, theirs: str, ours: str, dense: bool) -> Iterator[HfTensor]:
    hidden = config.hidden_size
    for name, shape in _attention_shapes(config):
        yield HfTensor(f"{theirs}.self_attn.{name}.weight", shape, f"{ours}.self_attn.{name}.weight")
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield HfTensor(f"{theirs}.{name}.weight", (hidden,), f"{ours}.{name}.weight")
    if dense:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp", hidden, config.intermediate_size)
        return
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    yield HfTensor(f"{theirs}.mlp.gate.weight", (experts, hidden), f"{ours}.mlp.gate.weight")
    if config.scoring_func == "sigmoid":  # DeepseekV3 has the bias always; a model that does not use one gets zeros
        name = "mlp.gate.e_score_correction_bias"
        source = f"{ours}.{name}" if config.uses_bias else ""
        yield HfTensor(f"{theirs}.{name}", (experts,), source, fp32=True)
    for expert in range(experts):
        stem, own = f"{theirs}.mlp.experts.{expert}", f"{ours}.mlp.experts.{expert}"
        yield HfTensor(f"{stem}.gate_proj.weight", (width, hidden), f"{own}.gate_up_proj")
        yield HfTensor(f"{stem}.up_proj.weight", (width, hidden), f"{own}.gate_up_proj", width * hidden)
        yield HfTensor(f"{stem}.down_proj.weight", (hidden, width), f"{own}.down_proj")
    if config.n_shared_experts:
        shared = config.n_shared_experts * width
        yield from _mlp(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts", hidden, shared)


def _mlp(theirs: str, ours: str, hidden: int, width: int) -> Iterator[HfTensor]:
    for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        yield HfTensor(f"{theirs}.{name}.weight", shape, f"{ours}.{name}.weight")


def _attention_shapes(config: ModelConfig) -> list[tuple[str, _Shape]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries: list[tuple[str, _Shape]] = [("q_proj", (heads * config.qk_head_dim, hidden))]
    if config.q_lora_rank is not None:
        queries = [
            ("q_a_proj", (config.q_lora_rank, hidden)),
            ("q_a_layernorm", (config.q_lora_rank,)),
            ("q_b_proj", (heads * config.qk_head_dim, config.q_lora_rank)),
        ]
    return [
        *queries,
        ("kv_a_proj_with_mqa", (rank + config.qk_rope_head_dim, hidden)),
        ("kv_a_layernorm", (rank,)),
        ("kv_b_proj", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)),
        ("o_proj", (hidden, heads * config.v_head_dim)),
    ]
