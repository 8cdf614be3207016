"""bf16 training: gradients are summed over micro-steps and ranks in fp32, experts' over the ranks that hold them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import training
from tests.ranks.spawn import run_ranks


def errors(rank: int, world_size: int, payload: dict[str, Any]) -> list[dict[str, float]]:
    """For each case [ep, stage]: how far DeepSpeed's gradient of each parameter is from the sum in fp64 of the bf16
    gradients of all micro-steps, relative to its norm."""
    return [_errors(rank, ep_size, stage) for ep_size, stage in payload["cases"]]


def _errors(rank: int, ep_size: int, stage: int) -> dict[str, float]:
    from deepspeed.utils import safe_get_full_grad

    from launch.losses import Weights, compute_losses, target_counts
    from model.naming import is_expert
    from parallel.ranks import process_ranks
    from parallel.zero import ZeroEngine

    accumulation = 4 if dist.get_world_size() == 2 else 2
    ranks = process_ranks(ep_size, 120)
    model = training.build(ranks, recompute=False)
    engine = ZeroEngine(
        model, training.OPTIMIZER, ranks.layout, stage=stage, n_experts=training.MODEL.n_routed_experts,
        precision="bf16", micro_batch_size=training.SEQUENCES // ranks.layout.world_size // accumulation,
        accumulation_steps=accumulation, device=torch.device("cpu"), local_rank=rank,
    )  # fmt: skip
    exact: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        assert gradient.dtype == torch.bfloat16 or name.endswith("gate.weight"), name
        exact[name] = exact.get(name, 0.0) + gradient.detach().double()
        calls[name] = calls.get(name, 0) + 1

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: add(name, gradient))
    batches = training.my_batches(0, rank, ranks.layout.world_size, accumulation)
    depths = training.MODEL.num_nextn_predict_layers
    counts = ranks.dp.all_reduce(target_counts([batch.loss_mask for batch in batches], depths)).tolist()
    for number, batch in enumerate(batches):
        output = engine.forward(tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets)
        losses = compute_losses(output, batch.loss_mask, counts, training.SEQUENCES, Weights(0.3, 0.0))
        engine.backward(losses.total, last=number == len(batches) - 1)
    found = {}
    for name, parameter in model.named_parameters():
        # The exchange's backward has a graph of its own inside: it shows an expert's gradient once more.
        whole = exact[name] / (calls[name] // accumulation)
        (ranks.edp if is_expert(name) else ranks.dp).all_reduce(whole)
        got = safe_get_full_grad(parameter).double()
        whole = whole.view_as(got) / ranks.layout.world_size  # DeepSpeed averages over all ranks
        found[name] = float((got - whole).norm() / whole.norm().clamp_min(1e-30))
    engine.step(1e-3)
    engine.close()
    return found


@pytest.mark.parametrize(("world", "cases"), [(2, [[1, 1], [1, 2], [1, 3], [2, 1]]), (4, [[2, 1], [2, 2], [2, 3]])])
def test_gradients_are_summed_in_fp32(world: int, cases: list[list[int]]) -> None:
    for result in run_ranks(world, "tests.ranks.test_gradient_sums:errors", {"cases": cases}):
        for case, found in zip(cases, result, strict=True):
            assert len(found) > 30
            worst = max(found, key=lambda name: found[name])
            assert found[worst] < 1e-5, f"{worst}, world {world}, ep and stage {case}: {found[worst]:.2g}"
