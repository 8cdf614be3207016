"""The formula of a step's peak memory against how far the resident memory of real ranks rises."""

import ctypes
import gc
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.bench_ranks import PeakMemory
from launch.bench_step_ways import StepShape
from launch.losses import Weights, compute_losses
from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.exchange import make_exchange
from parallel.ranks import process_ranks
from parallel.step_memory import step_memory
from parallel.zero import ZeroEngine
from tests.ranks.spawn import run_ranks

SHAPE = StepShape(batch=2, layers=2)
CASES: list[dict[str, Any]] = [
    {"ep_size": 2, "zero_stage": 1},
    {"ep_size": 1, "zero_stage": 3},
    {"ep_size": 2, "zero_stage": 1, "recompute": True},
]
TOLERANCE = 0.05
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def peak_mib(rank: int, world_size: int, model_config: ModelConfig, parallel: ParallelConfig, batch: int) -> float:
    """Two steps of a model made here; the rise of resident memory, gone when this returns."""
    ranks = process_ranks(parallel.ep_size, 60)
    gc.collect()
    memory = PeakMemory()
    model = Transformer(model_config, make_exchange(parallel, ranks), recompute=parallel.recompute)
    init_weights(model, 0)
    engine = ZeroEngine(
        model, OptimizerConfig(), ranks.layout, stage=parallel.zero_stage, n_experts=model_config.n_routed_experts,
        precision="fp32", micro_batch_size=batch, accumulation_steps=1, device=torch.device("cpu"), local_rank=rank,
    )  # fmt: skip
    bucket = engine.settings["zero_optimization"].get("reduce_bucket_size", 0)
    assert bucket <= sum(parameter.numel() for parameter in model.parameters()) or parallel.zero_stage == 3
    generator = torch.Generator().manual_seed(rank)
    shape = (batch, SHAPE.seq_len)
    for _ in range(2):
        tokens, targets = torch.randint(0, model_config.vocab_size, (2, *shape), generator=generator)
        output = engine.forward(tokens=tokens, targets=targets)
        mask = torch.ones(shape, dtype=torch.bool)
        losses = compute_losses(output, mask, [mask.numel() * world_size], batch * world_size, Weights(0.3, 1e-4))
        engine.backward(losses.total, last=True)
        del output, losses
        engine.step(1e-3)
    found = memory.mib()
    engine.close()
    assert found is not None
    return found


def on_ranks(rank: int, world_size: int, payload: dict[str, Any]) -> list[float]:
    """Each case in turn, after a small model of its kind: what that makes the engine load is no step's memory."""
    # Every block beyond 64 KiB from the system and back: the resident memory is then what tensors take.
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 64 * 2**10)
    libc.mallopt(_TRIM_THRESHOLD, 128 * 2**10)
    model = SHAPE.model()
    small = replace(model, vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1)
    found = []
    for case in payload["cases"]:
        parallel = ParallelConfig(**case)
        peak_mib(rank, world_size, small, parallel, 1)
        found.append(peak_mib(rank, world_size, model, parallel, SHAPE.batch))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc's mallopt")
def test_the_formula_is_near_what_ranks_take() -> None:
    pytest.importorskip("deepspeed")
    by_rank = run_ranks(2, "tests.ranks.test_step_memory:on_ranks", {"cases": CASES})
    for number, case in enumerate(CASES):
        formula = step_memory(SHAPE.model(), ParallelConfig(**case), 2, SHAPE.batch, SHAPE.seq_len).peak / 2**20
        measured = max(found[number] for found in by_rank)
        assert formula == pytest.approx(measured, rel=TOLERANCE), (case, measured)
