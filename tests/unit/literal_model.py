"""A slow, literal DeepSeek-V3 for one sequence: loops over positions, heads and experts in fp64, from the papers.

Nothing here calls the model's code; it reads only its configuration and its weights by name.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=2, num_nextn_predict_layers=1, num_attention_heads=2,
    q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, intermediate_size=20,
    moe_intermediate_size=12, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    n_group=4, topk_group=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


def build(config: ModelConfig = TINY, seed: int = 3, bias: float = 0.2, **options) -> Transformer:
    """A small model in which nothing is neutral: norms differ from 1, the biases from 0."""
    model = Transformer(config, LocalExchange(), **options)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for buffer in model.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * bias)
    return model


def batch(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, (B, S) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (sequences, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


class Literal:
    """The same weights, the same maths, no speed."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.counts = {name: [0] * self.config.n_routed_experts for name in self.config.moe_layers}
        self.changed = dict.fromkeys(self.config.moe_layers, 0)
        self.balance = 0.0

    def losses(self, tokens: list[int], targets: list[int], docs: list[int]) -> list[list[float]]:
        """Loss by depth and position: [0] of the main head (S of them), [k] of module k (S - k of them)."""
        embedded = [self.w["embed_tokens.weight"][token] for token in tokens]
        hidden = embedded
        self.works = [True] * len(tokens)
        for i in range(self.config.num_hidden_layers):
            hidden = self._layer(f"layers.{i}", hidden, docs, dense=i < self.config.first_k_dense_replace)
        hidden = [self._norm("norm", h) for h in hidden]
        result = [[self._nll(h, targets[t]) for t, h in enumerate(hidden)]]
        for k in range(1, self.config.num_nextn_predict_layers + 1):
            path = f"mtp.{k - 1}"
            self.works = [docs[t] == docs[t + k] for t in range(len(tokens) - k)]
            joined = []
            for t in range(len(tokens) - k):
                both = torch.cat([self._norm(f"{path}.enorm", embedded[t + k]), self._norm(f"{path}.hnorm", hidden[t])])
                joined.append(self.w[f"{path}.eh_proj.weight"] @ both)
            hidden = [self._norm(f"{path}.norm", h) for h in self._layer(f"{path}.block", joined, docs, dense=False)]
            result.append([self._nll(h, targets[t + k]) for t, h in enumerate(hidden)])
        return result

    def _nll(self, hidden: Tensor, target: int) -> float:
        logits = self.w["lm_head.weight"] @ hidden
        return (logits.exp().sum().log() - logits[target]).item()

    def _norm(self, path: str, x: Tensor) -> Tensor:
        eps = self.config.latent_eps if path.endswith("_a_layernorm") else self.config.rms_norm_eps
        return x / torch.sqrt((x * x).mean() + eps) * self.w[f"{path}.weight"]

    def _layer(self, path: str, xs: list[Tensor], docs: list[int], dense: bool) -> list[Tensor]:
        attended = self._attention(f"{path}.self_attn", [self._norm(f"{path}.input_layernorm", x) for x in xs], docs)
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        normed = [self._norm(f"{path}.post_attention_layernorm", x) for x in xs]
        fed = [self._mlp(f"{path}.mlp", x) for x in normed] if dense else self._moe(path, normed)
        return [x + f for x, f in zip(xs, fed, strict=True)]

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        frequencies, magnitude = self._rotary()
        out = torch.empty_like(x)
        for i, frequency in enumerate(frequencies):
            cos, sin = math.cos(position * frequency) * magnitude, math.sin(position * frequency) * magnitude
            out[2 * i] = x[2 * i] * cos - x[2 * i + 1] * sin
            out[2 * i + 1] = x[2 * i + 1] * cos + x[2 * i] * sin
        return out

    def _rotary(self) -> tuple[list[float], float]:
        """YaRN as its paper words it: by how often a pair turns in the original context."""
        width, base, yarn = self.config.qk_rope_head_dim, self.config.rope_theta, self.config.rope_scaling
        plain = [1.0 / base ** (2 * i / width) for i in range(width // 2)]
        if yarn is None:
            return plain, 1.0
        context = yarn.original_max_position_embeddings

        def index_of(turns: float) -> float:  # solve context / (2 pi base^(2i/width)) = turns for i
            return width / 2 * math.log(context / (2 * math.pi * turns), base)

        low, high = max(math.floor(index_of(yarn.beta_fast)), 0), min(math.ceil(index_of(yarn.beta_slow)), width - 1)
        mixed = []
        for i, frequency in enumerate(plain):
            divided = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
            mixed.append(divided * frequency / yarn.factor + (1 - divided) * frequency)
        log = 0.1 * math.log(yarn.factor)
        return mixed, (log * yarn.mscale + 1) / (log * yarn.mscale_all_dim + 1)

    def _attention(self, path: str, xs: list[Tensor], docs: list[int]) -> list[Tensor]:
        c, w = self.config, self.w
        scale = 1 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.rope_scaling is not None:
            scale *= (0.1 * c.rope_scaling.mscale_all_dim * math.log(c.rope_scaling.factor) + 1) ** 2
        queries, keys, values = [], [], []  # [position][head]
        for t, x in enumerate(xs):
            if c.q_lora_rank is None:
                flat = w[f"{path}.q_proj.weight"] @ x
            else:
                low = self._norm(f"{path}.q_a_layernorm", w[f"{path}.q_a_proj.weight"] @ x)
                flat = w[f"{path}.q_b_proj.weight"] @ low
            both = w[f"{path}.kv_a_proj_with_mqa.weight"] @ x
            latent = self._norm(f"{path}.kv_a_layernorm", both[: c.kv_lora_rank])
            shared = self._rotate(both[c.kv_lora_rank :], t)
            wide = w[f"{path}.kv_b_proj.weight"] @ latent
            q, k, v = [], [], []
            for head in range(c.num_attention_heads):
                mine = flat[head * c.qk_head_dim : (head + 1) * c.qk_head_dim]
                n = c.qk_nope_head_dim
                q.append(torch.cat([mine[:n], self._rotate(mine[n:], t)]))
                kv = wide[head * (n + c.v_head_dim) : (head + 1) * (n + c.v_head_dim)]
                k.append(torch.cat([kv[:n], shared]))
                v.append(kv[n:])
            queries.append(q), keys.append(k), values.append(v)
        out = []
        for t in range(len(xs)):
            heads = []
            for head in range(c.num_attention_heads):
                seen = [s for s in range(t + 1) if docs[s] == docs[t]]
                weights = torch.softmax(torch.stack([scale * (queries[t][head] @ keys[s][head]) for s in seen]), 0)
                heads.append(sum(p * values[s][head] for p, s in zip(weights, seen, strict=True)))
            out.append(w[f"{path}.o_proj.weight"] @ torch.cat(heads))
        return out

    def _silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def _mlp(self, path: str, x: Tensor) -> Tensor:
        gate, up = self.w[f"{path}.gate_proj.weight"] @ x, self.w[f"{path}.up_proj.weight"] @ x
        return self.w[f"{path}.down_proj.weight"] @ (self._silu(gate) * up)

    def _expert(self, path: str, expert: int, x: Tensor) -> Tensor:
        inner = self.w[f"{path}.experts.gate_up_proj"][expert] @ x
        width = self.config.moe_intermediate_size
        return self.w[f"{path}.experts.down_proj"][expert] @ (self._silu(inner[:width]) * inner[width:])

    def _moe(self, layer: str, xs: list[Tensor]) -> list[Tensor]:
        c, path = self.config, f"{layer}.mlp"
        bias = self.w[f"{path}.gate.e_score_correction_bias"].tolist()
        out, all_scores, counts = [], [], [0] * c.n_routed_experts
        for x, works in zip(xs, self.works, strict=True):
            if not works:  # the token ahead is of another document
                out.append(torch.zeros_like(x))
                continue
            logits = self.w[f"{path}.gate.weight"] @ x
            scores = (torch.sigmoid(logits) if c.scoring_func == "sigmoid" else torch.softmax(logits, 0)).tolist()
            chosen = choose(scores, bias if c.topk_method == "noaux_tc" else None, c)
            self.changed[layer] += len(set(chosen) - set(choose(scores, None, c)))
            weights = {e: scores[e] for e in chosen}
            if c.norm_topk_prob:
                weights = {e: s / sum(weights.values()) for e, s in weights.items()}
            y = torch.zeros_like(x)
            for e, weight in weights.items():
                y = y + weight * c.routed_scaling_factor * self._expert(path, e, x)
                counts[e] += 1
            if c.n_shared_experts:
                y = y + self._mlp(f"{path}.shared_experts", x)
            out.append(y)
            all_scores.append(scores)
        for e in range(c.n_routed_experts):
            frequency = c.n_routed_experts / (c.num_experts_per_tok * len(all_scores)) * counts[e]
            probability = sum(s[e] / sum(s) for s in all_scores) / len(all_scores)
            self.balance += frequency * probability
            self.counts[layer][e] += counts[e]
        return out


def choose(scores: list[float], bias: list[float] | None, config: ModelConfig) -> list[int]:
    """The experts of one token, with Python's sort; without bias a group still counts its two best under noaux_tc."""
    biased = [s + (bias[e] if bias else 0.0) for e, s in enumerate(scores)]
    allowed = list(range(config.n_routed_experts))
    if config.topk_method != "greedy":
        size = config.n_routed_experts // config.n_group
        best = 2 if config.topk_method == "noaux_tc" else 1
        groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(config.n_group)]
        ranking = sorted(range(config.n_group), key=lambda g: -sum(groups[g][:best]))
        allowed = [e for e in allowed if e // size in ranking[: config.topk_group]]
    return sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
