"""How large the weights are that decide where tokens go and what is predicted: they grow before a run goes wrong."""

import torch

from parallel.communicator import Communicator
from parallel.engine import Engine

_ROUTER, _HEAD = ".mlp.gate.weight", "lm_head.weight"


def weight_sizes(engine: Engine, communicator: Communicator) -> dict[str, float]:
    """Root mean square of each router's weights and of the output layer's, from the fp32 masters; collective.

    Large router weights make the scores of all experts 0 or 1; a large output layer makes logits large.

    Args:
        communicator: all ranks, each of which holds a share.

    Returns:
        by name, `router of layers.3` or `output layer`; the same on every rank.
    """
    names = [name for name, _ in engine.module.named_parameters() if name == _HEAD or name.endswith(_ROUTER)]
    sums = torch.zeros((len(names), 2), dtype=torch.float64)  # squares, and how many
    place = {name: row for row, name in enumerate(names)}
    for shard in engine.state_shards():
        if shard.kind == "weight" and shard.parameter in place:
            row = sums[place[shard.parameter]]
            row[0] += float(shard.values.double().square().sum())
            row[1] += shard.values.numel()
    communicator.all_reduce(sums)
    labels = ["output layer" if name == _HEAD else f"router of {name.removesuffix(_ROUTER)}" for name in names]
    return dict(zip(labels, (sums[:, 0] / sums[:, 1].clamp_min(1)).sqrt().tolist(), strict=True))
