"""Which slot of a rank holds which expert, over the whole model: read, change, and name the weights by it."""

# M MoE layers, E routed experts, L local experts, G ep_size

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.moe import MoE
from model.transformer import Transformer


def moe_layers(model: Transformer) -> list[MoE]:
    """The MoE layers in the order of ModelConfig.moe_layers, which is that of every table and statistic."""
    found = [model.get_submodule(f"{path}.mlp") for path in model.config.moe_layers]
    return [layer for layer in found if isinstance(layer, MoE)]


def placement(model: Transformer) -> Tensor:
    """(M, E) int64: slot s of layer row m, one of rank s // L, holds expert `placement[m, s]`."""
    rows = [layer.expert_of_slot for layer in moe_layers(model)]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), model.config.n_routed_experts)


def place(model: Transformer, table: Tensor) -> None:
    """Sends tokens by another table from now on. The caller brings the weights and moments to their new slots.

    Args:
        table: (M, E) int64, every row each expert once; the same on every rank.

    Raises:
        ValueError: a row that does not hold every expert once, or another number of rows.
    """
    for layer, row in zip(moe_layers(model), table.tolist(), strict=True):
        layer.place(row)


def local_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The numbers of the experts in each stacked parameter of this rank, by the parameter's name, in storage order."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            for name, _ in module.experts.named_parameters():
                found[f"{path}.experts.{name}"] = module.local_experts
    return found
