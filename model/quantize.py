"""Rounds a model's matrices to 8 or 4 bits for generation and evaluation; what is rounded cannot be trained."""

# T tokens, D hidden, V vocabulary, L experts, I expert width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.quantized import Bits, Quantized, problems, quantize_matrix, quantized_linear
from model.exchange import Exchange
from model.layers import Head, Linear
from model.moe import Experts
from model.transformer import Transformer

GROUP_SIZE = 32  # of 4-bit groups; with 8 bits a row of weights is one group unless a size is given
_ROWS_OF_LOGITS = 1024  # tokens whose logits are alive at once where losses are asked for


@dataclass(frozen=True)
class QuantizedSize:
    """Bytes of all weights before and after, and how many matrices were rounded."""

    before: int
    after: int
    n_matrices: int


class QuantizedLinear(nn.Module):
    """Stands for a Linear (N, K): (..., K) -> (..., N)."""

    def __init__(self, matrix: Quantized) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return quantized_linear(rows, self.matrix).view(*x.shape[:-1], -1)


class QuantizedHead(QuantizedLinear):
    """Stands for a Head: logits, or losses where targets are given."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Args: x (..., D); targets (...) int64 or None. Returns: logits (..., V), or losses (...) fp32."""
        if targets is None:
            return super().forward(x)
        rows, wanted = x.reshape(-1, x.shape[-1]).split(_ROWS_OF_LOGITS), targets.reshape(-1).split(_ROWS_OF_LOGITS)
        losses = [
            F.cross_entropy(super(QuantizedHead, self).forward(part).float(), goal, reduction="none")
            for part, goal in zip(rows, wanted, strict=True)
        ]
        return torch.cat(losses).view(targets.shape)


class QuantizedExperts(nn.Module):
    """Stands for Experts: the same call, a pair of quantised matrices (2I, D) and (D, I) for each expert."""

    inspect = None

    def __init__(self, first: list[Quantized], second: list[Quantized]) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        n_routed_experts: int,
        exchange: Exchange,
        meanwhile: Callable[[], Tensor] | None,
        layer: str,
    ) -> tuple[Tensor, Tensor | None]:
        """See Experts."""
        return exchange.run(x, topk_ids, topk_weights, n_routed_experts, self.weighted_sums, (), meanwhile, layer)

    def weighted_sums(
        self, rows: Tensor, token_of_row: Tensor, rows_per_expert: tuple[int, ...], weights: Tensor
    ) -> Tensor:
        """The model.exchange.ExpertFunction: rows (R, D), choices sorted by expert -> (R, D)."""
        out = torch.zeros_like(rows)
        for expert, (tokens, weight) in enumerate(
            zip(token_of_row.split(list(rows_per_expert)), weights.split(list(rows_per_expert)), strict=True)
        ):
            if len(tokens):
                gate, up = quantized_linear(rows.index_select(0, tokens), self.first[expert]).chunk(2, dim=-1)
                active = F.silu(gate) * up * weight.unsqueeze(-1).to(rows.dtype)
                out.index_add_(0, tokens, quantized_linear(active, self.second[expert]))
        return out


@torch.no_grad()
def quantize(
    model: Transformer, bits: Bits, group_size: int | None = None, zero_points: bool | None = None
) -> QuantizedSize:
    """Round a model's matrices in place.

    Embedding, normalisations, the router and kv_b_proj stay as they are: the router's choices are worth more than its
    bytes, and absorbed attention reads kv_b_proj as two stacks of small matrices. The head never gets fewer than 8
    bits.

    Args:
        model: all experts in one process; used for generation and evaluation only afterwards.
        bits: 8 or 4.
        group_size: inputs that share a scale; None is a whole row with 8 bits and GROUP_SIZE with 4. Where it does not
            divide a matrix's inputs that matrix has one group a row.
        zero_points: whether groups have an offset beside their scale; None is yes with 4 bits and no with 8.

    Raises:
        ValueError: bits or group size not possible, a model that is quantised already or that holds a part of its
            experts.
    """
    found = problems(bits, group_size)
    if model.exchange.ep_size > 1:
        found.append("a model that holds a part of its experts cannot be quantised; load it into one process")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        found.append("the model is quantised already; load it again")
    if found:
        raise ValueError("; ".join(found))
    size = group_size if group_size or bits == 8 else GROUP_SIZE
    offsets = bits == 4 if zero_points is None else zero_points
    before = _bytes_of(model)
    held = n_matrices = 0

    def rounded(weight: Tensor, wanted: Bits = bits) -> Quantized:
        nonlocal held, n_matrices
        plain = wanted != bits  # the head beside 4-bit layers
        made = quantize_matrix(weight, wanted, None if plain else size, offsets and not plain)
        held, n_matrices = held + made.nbytes, n_matrices + 1
        return made

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and name != "kv_b_proj":
                setattr(parent, name, QuantizedLinear(rounded(child.weight)))
            elif isinstance(child, Head):
                setattr(parent, name, QuantizedHead(rounded(child.weight, 8)))
            elif isinstance(child, Experts):
                first = [rounded(weight) for weight in child.gate_up_proj]
                setattr(parent, name, QuantizedExperts(first, [rounded(weight) for weight in child.down_proj]))
    return QuantizedSize(before, _bytes_of(model) + held, n_matrices)


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
