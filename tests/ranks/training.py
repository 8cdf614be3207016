"""A tiny training run on fixed random data at any layout, for equality with one rank. No data room, no launcher."""

import gc
import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.losses import Weights, compute_losses, target_counts
from model.config import ModelConfig
from model.init import init_weights
from model.naming import pieces
from model.router import choose_experts
from model.routing_stats import Collect
from model.slots import local_experts
from model.transformer import Transformer
from parallel.balance import Balancer
from parallel.config import BalanceConfig, OptimizerConfig, ParallelConfig
from parallel.engine import PlainEngine
from parallel.exchange import make_exchange
from parallel.ranks import Ranks, process_ranks, single_rank, virtual_ranks

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_nextn_predict_layers=1, num_attention_heads=2,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=64,
    moe_intermediate_size=16, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    n_group=2, topk_group=1, max_position_embeddings=64,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=3e-3, grad_clip=0.5, warmup_steps=0, schedule="constant")
BALANCE = BalanceConfig(rate=0.01, seq_aux_loss_coef=1e-3)
SEQUENCES, LENGTH = 8, 16
PLAIN = ParallelConfig()


class Batch(NamedTuple):
    """Sequences: tokens, targets, doc_ids (B, S) int64; loss_mask, real (B, S) bool."""

    tokens: Tensor
    targets: Tensor
    doc_ids: Tensor
    loss_mask: Tensor
    real: Tensor


def global_batch(step: int) -> Batch:
    """All sequences of a step, the same for every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    stream = torch.randint(0, MODEL.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
    stream[:, :4] = 7  # a common beginning, so that routing is far from even
    doc_ids = (torch.arange(LENGTH).expand(SEQUENCES, -1) >= torch.arange(SEQUENCES).unsqueeze(1) + 3).long()
    loss_mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    loss_mask[0, 5:] = False  # tokens that are real and yet have no loss
    real = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    real[1, 10:] = False
    real[[3, 7]] = False  # all that rank 3 of 4 has
    loss_mask &= real
    return Batch(stream[:, :-1], stream[:, 1:], doc_ids, loss_mask, real)


def my_batches(step: int, rank: int, world_size: int, accumulation: int) -> list[Batch]:
    """Rank r takes the sequences n with n % world == r, in micro-batches."""
    whole = global_batch(step)
    mine = torch.arange(SEQUENCES)[torch.arange(SEQUENCES) % world_size == rank]
    return [Batch(*(field[part] for field in whole)) for part in mine.chunk(accumulation)]


def build(ranks: Ranks, recompute: bool, seed: int = 5, parallel: ParallelConfig = PLAIN) -> Transformer:
    """The model of one rank, with everybody's start values."""
    exchange = make_exchange(parallel, ranks)
    model = Transformer(MODEL, exchange, recompute=recompute)
    init_weights(model, seed)
    return model


def routers(model: Transformer) -> dict[str, torch.Tensor]:
    """The routing biases by logical name, in the order of the statistics."""
    return {
        f"{path}.mlp.gate.e_score_correction_bias": model.get_submodule(path).mlp.gate.e_score_correction_bias
        for path in MODEL.moe_layers
    }


class NearTies:
    """Notices tokens whose choice of experts would change if a score moved by `width`: rounding may flip these."""

    def __init__(self, model: Transformer, width: float = 2e-6) -> None:
        self.found = 0
        self.width = width
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, router: Any, inputs: tuple, outputs: tuple) -> None:
        scores = (inputs[0].reshape(-1, inputs[0].shape[-1]) @ router.weight.T).sigmoid()
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            moved = scores + (torch.rand(scores.shape, generator=generator) * 2 - 1) * self.width
            chosen = choose_experts(moved, router.e_score_correction_bias, router.config)
            self.found += int((chosen.sort().values != outputs[0].sort().values).any(1).sum())

    def reset(self) -> int:
        """Near-ties since the last call."""
        found, self.found = self.found, 0
        return found


def train(
    engine: Any, model: Transformer, ranks: Ranks, accumulation: int, steps: range, gradients: bool = False,
    near_ties: NearTies | None = None, balance: BalanceConfig = BALANCE,
) -> dict:  # fmt: skip
    """Runs steps and returns what must be equal everywhere: losses, norms, counts, biases, and gradients on request."""
    balancer = Balancer(list(routers(model).values()), balance, ranks.dp)
    collect = Collect(bias_histogram=balancer.wants_histogram)
    result: dict[str, Any] = {"losses": [], "norms": [], "counts": [], "biases": [], "gradients": {}, "near_ties": []}
    for step in steps:
        batches = my_batches(step, ranks.layout.rank, ranks.layout.world_size, accumulation)
        counts = ranks.dp.all_reduce(
            target_counts(
                [batch.loss_mask for batch in batches],
                MODEL.num_nextn_predict_layers,
                [batch.doc_ids for batch in batches],
            )
        ).tolist()
        n_sequences = int(global_batch(step).real.any(1).sum())
        sums = 0
        for i, batch in enumerate(batches):
            output = engine.forward(
                tokens=batch.tokens, doc_ids=batch.doc_ids, targets=batch.targets, collect=collect, real=batch.real
            )
            losses = compute_losses(
                output,
                batch.loss_mask,
                counts,
                n_sequences,
                Weights(0.3, BALANCE.seq_aux_loss_coef),
                doc_ids=batch.doc_ids,
            )
            engine.backward(losses.total, last=i == len(batches) - 1)
            sums = sums + losses.sums
            balancer.add(output.routing)
        total = ranks.dp.all_reduce(sums)
        if gradients:
            result["gradients"] = local_gradients(model, ranks)
        result["losses"].append(float(total[0]) / counts[0])
        result["norms"].append(engine.grad_norm())
        engine.step(OPTIMIZER.lr)
        result["counts"].append(balancer.step(step).tolist())
        result["biases"].append(balancer.bias_table().tolist())
        result["near_ties"].append(near_ties.reset() if near_ties else 0)
    return result


def local_gradients(model: Transformer, ranks: Ranks) -> dict[str, list[float]]:
    """This rank's reduced gradients by logical name (engines that keep them in `.grad`)."""
    found, experts = {}, local_experts(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
                flat = parameter.grad.reshape(-1)[piece.start : piece.start + piece.numel]
                found[piece.logical_name] = flat.tolist()
    return found


def one_rank(
    accumulation: int = 1, recompute: bool = False, steps: int = 5, gradients: bool = False,
    balance: BalanceConfig = BALANCE,
) -> dict:  # fmt: skip
    """The reference: one process, plain AdamW."""
    ranks = single_rank()
    model = build(ranks, recompute)
    engine = PlainEngine(model, OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
    return train(engine, model, ranks, accumulation, range(steps), gradients, NearTies(model), balance)


def virtual(
    world, rank: int, ep_size: int, accumulation: int, recompute: bool, gradients: bool = False,
    parallel: ParallelConfig = PLAIN,
) -> dict:  # fmt: skip
    """One virtual rank."""
    ranks = virtual_ranks(world, ep_size, rank, parallel.ranks_per_node)
    model = build(ranks, recompute, parallel=parallel)
    engine = PlainEngine(model, OPTIMIZER, ranks.layout, ranks.dp, ranks.edp)
    return train(engine, model, ranks, accumulation, range(5), gradients)


def zero_cases(rank: int, world_size: int, payload: dict) -> list[dict]:
    """Several layouts in one set of processes: payload["cases"] = [[ep, stage, accumulation, recompute], ...]."""
    results = []
    for case in payload["cases"]:
        results.append(zero(rank, *case))
        gc.freeze()  # ZeRO 3 searches all objects for cycles at each start: not those of torch, half a second each time
    return results


def zero(
    rank: int, ep_size: int, stage: int, accumulation: int, recompute: bool, precision: str = "fp32", steps: int = 5,
    options: dict[str, Any] | None = None,
) -> dict:  # fmt: skip
    """Steps under DeepSpeed at one layout; options: of ParallelConfig."""
    from parallel.zero import ZeroEngine

    parallel = ParallelConfig(**(options or {}))
    ranks = process_ranks(ep_size, 120, parallel.ranks_per_node)
    model = build(ranks, recompute, parallel=parallel)
    engine = ZeroEngine(
        model, OPTIMIZER, ranks.layout, stage=stage, n_experts=MODEL.n_routed_experts, precision=precision,
        micro_batch_size=SEQUENCES // ranks.layout.world_size // accumulation, accumulation_steps=accumulation,
        device=torch.device("cpu"), local_rank=rank,
    )  # fmt: skip
    result = train(engine, model, ranks, accumulation, range(steps))
    result["compiler_loaded"] = "torch._inductor.compile_fx" in sys.modules
    result["dtypes"] = sorted({str(bias.dtype) for bias in routers(model).values()})
    engine.close()
    return result


if __name__ == "__main__":
    print(json.dumps(one_rank()["losses"]))
