"""The model's layers over latent caches: tokens in, hidden states out, earlier tokens never computed again."""

# B cache rows, N tokens of a forward (packed), D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.absorbed import CachedAttention
from model.block import Block
from model.config import ModelConfig
from model.few_rows import FeedForward
from model.inference import Function, linear_function, norm_function
from model.latent_cache import LatentCache, latent_width
from model.positions import rotary_tables
from model.span import Span
from model.transformer import Transformer


def can_cache(model: Transformer) -> bool:
    """Whether weights can be read directly. Under ZeRO stage 3 they are not here outside their modules' forward."""
    return all(parameter.numel() for parameter in model.parameters())


_Layer = tuple[Function, CachedAttention, Function, FeedForward]


class CachedStack:
    """Decoder layers with a cache of their own: all of the model's, or the one of a multi-token prediction module."""

    def __init__(self, blocks: Sequence[Block], config: ModelConfig, rows: int) -> None:
        weight = blocks[0].input_layernorm.weight if blocks else torch.empty(0)
        self._layers: list[_Layer] = [
            (norm_function(block.input_layernorm), CachedAttention(block.self_attn),
             norm_function(block.post_attention_layernorm), FeedForward(block.mlp))
            for block in blocks
        ]  # fmt: skip
        self.cache = LatentCache(
            len(blocks), latent_width(config), rows, device=weight.device, dtype=weight.dtype
        )  # fmt: skip
        self._config, self._device = config, weight.device
        self._turns = self._rotations(self.cache.capacity)

    def _rotations(self, n_positions: int) -> Tensor:
        """(P, 1, r/2) complex64."""
        cos, sin = rotary_tables(self._config, n_positions, self._device)
        return torch.complex(cos, sin).unsqueeze(1)

    def span(self, rows: Sequence[int], counts: Sequence[int]) -> Span:
        """The next tokens' places: counts[i] >= 1 behind what cache row rows[i] holds. Makes room for them."""
        starts = [self.cache.lengths[row] for row in rows]
        span = Span(rows, starts, counts, len(self.cache.lengths), self._device)
        self.cache.reserve(span.reach)
        if span.reach > self._turns.shape[0]:
            self._turns = self._rotations(self.cache.capacity)
        return span

    def run(self, x: Tensor, span: Span) -> Tensor:
        """Through all layers, x (N, D) -> (N, D); the cache's rows are longer afterwards."""
        turn = self._turns[span.positions]
        for layer, store in zip(self._layers, self.cache.layers, strict=True):
            x = self._through(layer, x, turn, span, store)
        self._lengthen(span)
        return x

    def fill(self, x: Tensor, span: Span) -> None:
        """Only lengthens the cache's rows: of the last layer nobody needs more than its entries, and with prompts that
        are long beside what is written, a layer less is a part of all the time."""
        turn = self._turns[span.positions]
        for layer, store in zip(self._layers[:-1], self.cache.layers, strict=False):
            x = self._through(layer, x, turn, span, store)
        before, attention, _, _ = self._layers[-1]
        attention.fill(before(x), turn, span, self.cache.layers[len(self._layers) - 1])
        self._lengthen(span)

    @staticmethod
    def _through(layer: _Layer, x: Tensor, turn: Tensor, span: Span, store: Tensor) -> Tensor:
        before, attention, between, feed_forward = layer
        x = x + attention.forward(before(x), turn, span, store)
        return x.add_(feed_forward.forward(between(x)))

    def _lengthen(self, span: Span) -> None:
        for row, count in zip(span.rows, span.counts, strict=True):
            self.cache.lengths[row] += count


class Decoder:
    """A model and the cache of its decoder layers."""

    def __init__(self, model: Transformer, rows: int) -> None:
        self.model = model
        self._norm, self._head = norm_function(model.norm), linear_function(model.lm_head)
        self.stack = CachedStack([layer for layer in model.layers if isinstance(layer, Block)], model.config, rows)

    @property
    def cache(self) -> LatentCache:
        """Of all decoder layers."""
        return self.stack.cache

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Span]:
        """Adds tokens to cache rows.

        Args:
            rows: different rows of the cache.
            tokens: for each at least one token.

        Returns:
            hidden states (N, D) of the new tokens, normalised as the head sees them, and their places.
        """
        span = self.stack.span(rows, [len(new) for new in tokens])
        return self._norm(self.stack.run(self._embedded(tokens), span)), span

    @torch.inference_mode()
    def fill(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """The same for tokens whose hidden states nobody asks for."""
        self.stack.fill(self._embedded(tokens), self.stack.span(rows, [len(new) for new in tokens]))

    def _embedded(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        ids = torch.tensor([token for new in tokens for token in new], device=self.model.embed_tokens.weight.device)
        return self.model.embed_tokens(ids)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) fp32."""
        return self._head(hidden).float()
