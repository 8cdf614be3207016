"""Peak memory of a training step on one rank, by formula: nothing is built. Pure functions of the configurations.

    state        weights, fp32 masters and moments, as the ZeRO stage cuts them
    saved        what the forward keeps: every layer, then the head with the logits that it may keep
    peak         the fullest moment: the head's backward, each layer's backward from the last to the first (what the
                 layers before it keep, gradients of those behind it, the experts' work), or the reduction at the end

fp32, on a CPU: elsewhere attention keeps its result too. Tensors only: programs, and what the allocator keeps, come on
top.
"""

# T tokens, D hidden, E experts, L local experts, K top-k, G ep_size, I expert width, R rows that came, N their choices

from dataclasses import dataclass
from math import comb

from kernels.cross_entropy import BLOCK_BYTES, KEEP_BYTES, LEAST_WORDS
from kernels.experts_reference import PIECE_BYTES
from model.config import ModelConfig
from model.count import count_parameters
from parallel.config import ParallelConfig
from parallel.memory import bounded_bytes, expert_bytes, several_ranks_bytes

_FLOAT = 4
# DeepSpeed's defaults (0.19) for stage 3: parameters below this many numbers stay whole; so many are fetched ahead.
_PERSISTENT = 100_000
_PREFETCH = 50_000_000


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank. gradients: of all its parameters. peak: the most at once, all others included."""

    state: int
    saved: int
    gradients: int
    peak: int


@dataclass(frozen=True)
class Shares:
    """Parameters of one rank. dense: of all but routed experts. experts: of its own routed experts. layer_experts: of
    these, one layer's. owned: those whose optimizer state it keeps, from stage 1. cut: of these, parts of parameters
    that other ranks have too."""

    dense: int
    experts: int
    layer_experts: int
    owned: int
    cut: int

    @property
    def local(self) -> int:
        """All that this rank computes with."""
        return self.dense + self.experts


def shares(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Shares:
    """Who holds what: dense parameters are cut over all ranks, experts over those that hold the same ones."""
    counts = count_parameters(model)
    n_moe = counts.n_moe_main + counts.n_mtp
    local = model.n_routed_experts // parallel.ep_size
    layer = local * counts.expert
    dense = counts.total - n_moe * model.n_routed_experts * counts.expert
    holders = world_size // parallel.ep_size
    own_dense, own_experts = -(-dense // world_size), -(-n_moe * layer // holders)
    cut = (own_dense if world_size > 1 else 0) + (own_experts if holders > 1 else 0)
    return Shares(dense, n_moe * layer, layer, own_dense + own_experts, cut)


def step_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    micro_batch_size: int,
    seq_len: int,
    load: float = 1.0,
) -> StepMemory:
    """The peak of a training step with DeepSpeed's ZeRO.

    Args:
        world_size: ranks. micro_batch_size: sequences of a rank and forward. seq_len: S.
        load: choices that fall on this rank's experts over an even rank's; 1 for even routing.

    Returns:
        Bytes, without programs, data and what the allocator keeps.
    """
    share = shares(model, parallel, world_size)
    tokens = micro_batch_size * seq_len
    state = _state(share, parallel.zero_stage)
    moe = _moe_layer(model, parallel, tokens, load)
    layers = [_dense_layer(model, tokens)] * model.first_k_dense_replace
    layers += [moe] * (model.num_hidden_layers - model.first_k_dense_replace)
    modules = model.num_nextn_predict_layers
    outside = _FLOAT * 4 * tokens * model.hidden_size  # of a prediction module: its norms' inputs, both halves joined
    layers += [_Layer(moe.saved + outside, moe.work, moe.parameters)] * modules
    inputs = _FLOAT * tokens * model.hidden_size
    kept = [inputs * (2 if i >= len(layers) - modules else 1) if parallel.recompute else layer.saved
            for i, layer in enumerate(layers)]  # fmt: skip
    head_kept, head_work = _head(model, tokens * (1 + modules))
    saved = sum(kept) + head_kept
    moments = [saved + head_work]
    sharded = parallel.zero_stage == 3
    fetched, bucket = _fetched(model, share, parallel, world_size) if sharded else (0, 0)
    if sharded:  # the forward of a step after the first: weights are fetched ahead, each twice while it arrives
        state += _FLOAT * _kept_whole(model)
        moments.append(saved + 2 * fetched)
    head = _FLOAT * model.vocab_size * model.hidden_size
    done = fetched if sharded else head  # gradients so far; in stage 3 they go to where the state has room for them
    for i in reversed(range(len(layers))):
        again = layers[i].saved - kept[i] if parallel.recompute else 0
        moments.append(sum(kept[: i + 1]) + again + layers[i].work + done)
        done += 0 if sharded else _FLOAT * layers[i].parameters
    gradients = _FLOAT * share.local
    if not sharded:
        moments.append(gradients + _reduction(share, parallel.zero_stage))
    return StepMemory(state, saved, gradients, state + bucket + max(moments))


@dataclass(frozen=True)
class _Layer:
    """saved: bytes from forward to backward. work: bytes beside it at the fullest moment of its backward. parameters:
    numbers in those that this rank holds."""

    saved: int
    work: int
    parameters: int


def _state(share: Shares, stage: int) -> int:
    """Weights, masters, moments. Stage 0 has no masters; stage 3 cuts weights too and has room for its gradients."""
    if stage == 0:
        return _FLOAT * 3 * share.local
    if stage < 3:
        return _FLOAT * (share.local + 3 * share.owned)
    return _FLOAT * 5 * share.owned


def _reduction(share: Shares, stage: int) -> int:
    """Beside the gradients at the end: in stage 0 a copy to reduce; above it this rank's part in one piece, and once
    more where it was cut out of several ranks' sum."""
    return _FLOAT * (share.local if stage == 0 else share.owned + share.cut)


def _fetched(model: ModelConfig, share: Shares, parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Of stage 3: bytes of weights fetched ahead, and of the buffer that gradients are reduced from, as far as it is
    written. It is emptied where parameters of other ranks' experts follow such as all ranks share."""
    cut = world_size > parallel.ep_size  # experts have several holders
    numbers = share.dense - _kept_whole(model) + (share.experts if cut else 0)
    alone = max(share.layer_experts, model.vocab_size * model.hidden_size)
    return _FLOAT * min(numbers, _PREFETCH), _FLOAT * (share.local if parallel.ep_size == 1 else alone)


def _kept_whole(model: ModelConfig) -> int:
    """Numbers in dense parameters that stage 3 leaves whole between steps."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    rank, out = model.q_lora_rank, heads * model.qk_head_dim
    attention = [hidden * out] if rank is None else [hidden * rank, rank, rank * out]
    latent = model.kv_lora_rank
    attention += [
        hidden * (latent + model.qk_rope_head_dim), latent,
        latent * heads * (model.qk_nope_head_dim + model.v_head_dim), heads * model.v_head_dim * hidden, hidden, hidden,
    ]  # fmt: skip
    routed = [model.n_routed_experts * hidden] + [hidden * model.n_shared_experts * model.moe_intermediate_size] * 3
    module = [hidden, hidden, 2 * hidden * hidden, hidden]

    def small(sizes: list[int]) -> int:
        return sum(size for size in sizes if size < _PERSISTENT)

    n_dense, modules = model.first_k_dense_replace, model.num_nextn_predict_layers
    return (
        small([model.vocab_size * hidden] * 2 + [hidden])
        + n_dense * small(attention + [hidden * model.intermediate_size] * 3)
        + (model.num_hidden_layers - n_dense) * small(attention + routed)
        + modules * small(attention + routed + module)
    )


def _attention(model: ModelConfig, tokens: int) -> int:
    """Saved up to the feed-forward: both norms' inputs and results, latents, queries, keys, values, their result."""
    heads, latent = model.num_attention_heads, model.kv_lora_rank + model.qk_rope_head_dim
    queries = 2 * model.q_lora_rank if model.q_lora_rank is not None else 0
    width = heads * 2 * (model.qk_head_dim + model.v_head_dim) + latent + model.kv_lora_rank + queries
    return _FLOAT * tokens * (4 * model.hidden_size + width + 3)


def _attention_parameters(model: ModelConfig) -> int:
    counts = count_parameters(model)
    router = model.n_routed_experts * model.hidden_size
    shared = model.n_shared_experts * counts.expert
    n_dense = model.first_k_dense_replace
    dense = n_dense * 3 * model.hidden_size * model.intermediate_size
    n_moe = counts.n_moe_main
    rest = counts.main_layers - model.hidden_size - dense - n_moe * (model.n_routed_experts * counts.expert + router)
    return (rest - n_moe * shared) // model.num_hidden_layers


def _dense_layer(model: ModelConfig, tokens: int) -> _Layer:
    width = model.intermediate_size
    work = _FLOAT * tokens * (3 * model.hidden_size + 3 * width)
    parameters = _attention_parameters(model) + 3 * model.hidden_size * width
    return _Layer(_attention(model, tokens) + _FLOAT * tokens * 3 * width, work, parameters)


def _moe_layer(model: ModelConfig, parallel: ParallelConfig, tokens: int, load: float) -> _Layer:
    """Attention, router, shared experts, and the routed path of parallel/memory.py."""
    hidden, width, top_k = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
    experts, size = model.n_routed_experts, parallel.ep_size
    local = experts // size
    shared = 3 * model.n_shared_experts * width
    router = experts + 3 * top_k + 4
    saved = _attention(model, tokens) + _FLOAT * tokens * (shared + router)
    n_rows, n_choices = tokens, tokens * top_k
    if size == 1 and not parallel.rows_budget:
        saved += expert_bytes(0, n_choices, hidden, width, _FLOAT)  # its rows are the second norm's result
    else:
        n_rows, n_choices = _came(model, parallel, tokens, load)
        if parallel.rows_budget and n_rows > parallel.rows_budget:
            n_choices = n_choices * parallel.rows_budget // n_rows
            n_rows = parallel.rows_budget
            saved += bounded_bytes(tokens, top_k, hidden, _FLOAT) - _FLOAT * tokens * hidden  # the norm's result again
            again = expert_bytes(n_rows, n_choices, hidden, width, _FLOAT)
        else:
            saved += several_ranks_bytes(
                tokens, top_k, [n_rows], n_rows, n_choices, hidden, width, _FLOAT, parallel.chunks
            )
            again = 0
        n_rows, n_choices = n_rows // parallel.chunks, n_choices // parallel.chunks
    parameters = local * 3 * hidden * width
    piece = min(max(256, PIECE_BYTES // (2 * (2 * width + hidden) * _FLOAT)), n_choices)
    floats = 2 * n_rows * hidden + piece * (2 * hidden + 5 * width) + parameters + 2 * tokens * hidden
    work = _FLOAT * floats + (again if size > 1 or parallel.rows_budget else 0)
    others = _attention_parameters(model) + experts * hidden + model.n_shared_experts * 3 * hidden * width
    return _Layer(saved, work, parameters + others)


def _came(model: ModelConfig, parallel: ParallelConfig, tokens: int, load: float) -> tuple[int, int]:
    """R and N of a rank with `load` times an even rank's choices, where tokens choose experts independently."""
    experts, top_k, size = model.n_routed_experts, model.num_experts_per_tok, parallel.ep_size
    n_choices = round(load * tokens * top_k)
    if parallel.dispatch == "all_to_all":
        return n_choices, n_choices
    passed_by = comb(experts - experts // size, top_k) / comb(experts, top_k)  # chance that a token has no expert here
    return min(size * tokens, n_choices, round(load * size * tokens * (1 - passed_by))), n_choices


def _head(model: ModelConfig, tokens: int) -> tuple[int, int]:
    """Saved by the last norm and the head with its losses; and what the head's backward needs beside it."""
    hidden, vocab = model.hidden_size, model.vocab_size
    words = min(vocab, max(LEAST_WORDS, BLOCK_BYTES["cpu"] // (_FLOAT * tokens)))
    block = _FLOAT * tokens * words
    kept = min(vocab * tokens * _FLOAT, KEEP_BYTES // block * block)
    return kept + _FLOAT * tokens * 2 * hidden, _FLOAT * (tokens * hidden + vocab * hidden) + block
