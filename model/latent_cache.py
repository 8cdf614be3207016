"""The latent cache: for each layer and token the normalised compressed latent and the rotated shared key, no more."""

# B rows (sequences), C capacity in tokens, W = kv_lora_rank + qk_rope_head_dim

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.config import ModelConfig

_FIRST_CAPACITY = 64  # tokens of a row that the first buffer has room for


def latent_width(config: ModelConfig) -> int:
    """W: numbers that one layer keeps of one token."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def latent_bytes(config: ModelConfig, n_tokens: int = 1, element_size: int = 2) -> int:
    """Bytes that the decoder layers keep of so many tokens: layers * (kv_lora_rank + qk_rope_head_dim) * element_size.

    DeepSeek-V3 in bfloat16: 61 * 576 * 2 = 70,272 bytes a token.

    Args:
        element_size: bytes of a number, 2 for bfloat16 and 4 for fp32.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2 and table 1.
    """
    return config.num_hidden_layers * latent_width(config) * element_size * n_tokens


class LatentCache:
    """Buffers of some layers for B rows, slot p of a row holding its token at position p.

    Rows have lengths of their own; what lies in slots at or past a row's length is stale and masked. So forgetting
    tokens means setting a length, and the buffers only ever grow.

    Attributes:
        layers: of each layer (B, C, W).
        lengths: of each row, tokens.
    """

    def __init__(
        self,
        n_layers: int,
        width: int,
        rows: int,
        capacity: int = _FIRST_CAPACITY,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Zeros and not empty: a masked slot has weight 0, and 0 times an uninitialised NaN is NaN.
        self.layers = [torch.zeros(rows, capacity, width, device=device, dtype=dtype) for _ in range(n_layers)]
        self.lengths = [0] * rows
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, n_tokens: int) -> None:
        """Makes room for so many tokens of each row; at least doubles, so that a token costs a constant number of
        copies however long a text gets."""
        if n_tokens <= self.capacity:
            return
        capacity = max(n_tokens, 2 * self.capacity)
        reach = max(self.lengths, default=0)
        for number, old in enumerate(self.layers):
            new = old.new_zeros(old.shape[0], capacity, old.shape[2])
            new[:, :reach] = old[:, :reach]
            self.layers[number] = new
        self.capacity = capacity

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's tokens from position `length` on.

        Raises:
            ValueError: the row has fewer.
        """
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} has {self.lengths[row]} tokens and cannot be cut to {length}")
        self.lengths[row] = length

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.layers[0].device)
        reach = max((self.lengths[row] for row in rows), default=0)
        for number, old in enumerate(self.layers):
            new = old.new_zeros(len(rows), self.capacity, old.shape[2])
            new[:, :reach] = old[:, :reach].index_select(0, index)
            self.layers[number] = new
        self.lengths = [self.lengths[row] for row in rows]
