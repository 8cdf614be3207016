"""The whole model: embedding, decoder layers, multi-token prediction modules, head, per-token losses."""

# B batch, S seq, T = B*S tokens, D hidden, V vocabulary, E routed experts

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import document_mask
from model.block import Block
from model.config import ModelConfig
from model.exchange import Exchange
from model.layers import Embedding, Head, RMSNorm
from model.mtp import MultiTokenPrediction
from model.positions import rotary_tables
from model.real_tokens import RealTokens, find_real
from model.router import RoutingMemory
from model.routing_stats import Collect, RoutingStats, stack_layers


class ModelOutput(NamedTuple):
    """One forward's result."""

    logits: Tensor | None  # (B, S, V), None where targets were given
    token_losses: Tensor | None  # (B, S) fp32, cross-entropy of each target, nats; None where no targets were given
    mtp_token_losses: tuple[
        Tensor, ...
    ]  # depth k = 1..: (B, S) fp32, loss of targets[t+k]; the last k positions are 0, and
    # where token t+k is of another document the number means nothing and must be masked (launch/losses.py)
    routing: RoutingStats


class Transformer(nn.Module):
    """DeepSeek-V3 (arXiv 2412.19437). Holds only this rank's experts; weights are NaN until initialised or loaded."""

    def __init__(
        self,
        config: ModelConfig,
        exchange: Exchange,
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build.

        Args:
            exchange: how rows reach their experts; its ep_size and ep_rank say which experts this model holds.
            recompute: keep only each layer's input for the backward and compute the layer again there.
            device, dtype: of the parameters; dtype None means torch's default.
        """
        super().__init__()
        self.config = config
        self.exchange = exchange
        self.recompute = recompute
        hidden, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = Embedding(vocab, hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(config, exchange, dense=i < config.first_k_dense_replace, device=device, dtype=dtype)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps, device, dtype)
        self.lm_head = Head(hidden, vocab, device, dtype)
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(config, exchange, device, dtype) for _ in range(config.num_nextn_predict_layers)
        )

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        targets: Tensor | None = None,
        collect: Collect | None = None,
        real: Tensor | None = None,
    ) -> ModelOutput:
        """Predict, or measure the prediction.

        Args:
            tokens: (B, S) int64 in [0, V).
            doc_ids: (B, S) integers, non-decreasing along S: a token sees only earlier ones of its document.
            targets: (B, S) int64 in [0, V), the token after each position. With it the output has losses and the
                prediction modules run; without it logits, and they do not.
            collect: statistics beyond those that are always made.
            real: (B, S) bool, False at padding, which goes to no expert and which no statistic counts; None where there
                is none. A position whose target merely does not enter the loss is real.
        """
        depths = range(0) if targets is None else self._prediction_depths(tokens.shape[1])
        several, found = find_real(real, doc_ids, len(depths))
        mask = document_mask(doc_ids) if doc_ids is not None and several else None
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        embedded = self.embed_tokens(tokens)  # (B, S, D)
        hidden = embedded
        statistics: list[tuple[Tensor, ...]] = []
        for layer in self.layers:
            hidden, *of_layer = self._run(collect, found[0], layer, hidden, cos, sin, mask)
            if of_layer:
                statistics.append(tuple(of_layer))
        hidden = self.norm(hidden)
        if targets is None:
            return ModelOutput(self.lm_head(hidden), None, (), self._stack(statistics, tokens.device))
        rows, row_targets = [hidden.flatten(0, 1)], [targets.flatten()]
        for k in depths:
            hidden, ahead = hidden[:, :-1], embedded[:, k:]  # (B, S-k, D)
            cos, sin = cos[:-1], sin[:-1]
            mask = None if mask is None else mask[:, :, :-1, :-1]
            hidden, *of_layer = self._run(collect, found[k], self.mtp[k - 1], hidden, ahead, cos, sin, mask)
            statistics.append(tuple(of_layer))
            rows.append(hidden.flatten(0, 1))
            row_targets.append(targets[:, k:].flatten())
        # One call of the head for all depths: its weight is gathered and its gradient reduced once.
        losses = self.lm_head(torch.cat(rows), torch.cat(row_targets)).split([part.shape[0] for part in rows])
        batch = tokens.shape[0]
        deeper = tuple(F.pad(losses[k].view(batch, -1), (0, k)) for k in depths)
        return ModelOutput(None, losses[0].view(batch, -1), deeper, self._stack(statistics, tokens.device))

    def _prediction_depths(self, seq_len: int) -> range:
        if seq_len <= len(self.mtp):
            raise ValueError(
                f"sequences of {seq_len} tokens are too short for {len(self.mtp)} multi-token prediction modules; "
                f"use at least {len(self.mtp) + 1} tokens, or fewer model.num_nextn_predict_layers"
            )
        return range(1, len(self.mtp) + 1)

    def _run(
        self, collect: Collect | None, real: RealTokens | None, layer: nn.Module, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        memory = RoutingMemory(collect)
        if not (self.recompute and torch.is_grad_enabled()):
            return cast(tuple[Tensor, ...], layer(*inputs, memory, real))
        # Reentrant: the layer is repeated as a whole, with all of its collectives, before any of its gradients. The
        # other kind repeats it inside the first gradient's computation, where ZeRO stage 3 has just gathered a weight:
        # the repeated forward releases it again. No random numbers to restore.
        return cast(
            tuple[Tensor, ...], checkpoint(layer, *inputs, memory, real, use_reentrant=True, preserve_rng_state=False)
        )

    def _stack(self, statistics: list[tuple[Tensor, ...]], device: torch.device) -> RoutingStats:
        return stack_layers(statistics, len(self.config.moe_layers), self.config.n_routed_experts, device)
