"""Models under training for `trimtab bench step`: ours in its train loop, and the peers', from the same weights."""

# T tokens of a rank, E experts, K top-k

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.entry import thread_count
from cluster.flag import StopFlag
from data.config import DataConfig
from data.stream import MicroBatch
from launch.bench_hf import hf_model
from launch.bench_moe_layers import auto_ep_settings
from launch.config import CheckpointConfig, Config, TelemetryConfig, TrainConfig
from model.config import ModelConfig
from model.router import Router, choose_experts
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import parameter_groups
from parallel.ranks import process_ranks

OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=0, schedule="constant")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepShape:
    """The model, and what a rank feeds it in a step."""

    batch: int = 4
    seq_len: int = 512
    hidden: int = 256
    width: int = 128
    experts: int = 16
    top_k: int = 4
    layers: int = 4
    vocab: int = 2048

    def model(self) -> ModelConfig:
        """Heads and latents in DeepSeek-V3's proportions to the width; experts in every layer."""
        unit = self.hidden // 16
        return ModelConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers, num_nextn_predict_layers=0,
            num_attention_heads=4, kv_lora_rank=4 * unit, qk_nope_head_dim=2 * unit, qk_rope_head_dim=unit,
            v_head_dim=2 * unit, intermediate_size=4 * self.hidden, moe_intermediate_size=self.width,
            first_k_dense_replace=0, n_routed_experts=self.experts, n_shared_experts=1,
            num_experts_per_tok=self.top_k, n_group=1, topk_group=1, max_position_embeddings=self.seq_len,
        )  # fmt: skip

    def config(self, data: str, ranks: int, steps: int, ep_size: int) -> Config:
        """A whole configuration: ZeRO 1, plain decoding of the data, no checkpoint but the last."""
        return Config(
            model=self.model(),
            data=DataConfig(path=data, seq_len=self.seq_len),
            parallel=ParallelConfig(ep_size=ep_size, zero_stage=1),
            optimizer=OPTIMIZER,
            train=TrainConfig(steps=steps, global_batch_size=self.batch * ranks, micro_batch_size=self.batch),
            checkpoint=CheckpointConfig(every_steps=10**6),
            telemetry=TelemetryConfig(console="off", heatmap_every_steps=10**6),
        )


def even_choice(n_tokens: int, n_experts: int, top_k: int) -> Tensor:
    """(T, E) fp32 to add to scores below 1: the greatest K of each token are then such that all loads are the same."""
    first = torch.arange(n_tokens)[:, None]
    chosen = (first + max(1, n_experts // top_k) * torch.arange(top_k)) % n_experts
    return torch.zeros(n_tokens, n_experts).scatter_(1, chosen, 10.0)


class Peer(Protocol):
    """A model of others under training."""

    def step(self, batch: MicroBatch) -> Tensor:
        """One whole optimizer step; returns this rank's mean loss."""
        ...

    def force(self, choice: Tensor) -> None:
        """From now on routers choose by score plus `choice` (T, E)."""
        ...


def _loss(logits: Tensor, batch: MicroBatch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def _adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)


class DataParallel:
    """transformers' model in torch's DistributedDataParallel with AdamW; every rank holds all experts."""

    def __init__(self, shape: StepShape, experts: str, seed: int) -> None:
        self.model = hf_model(shape.model(), experts, seed)
        self.engine = torch.nn.parallel.DistributedDataParallel(self.model)
        self.adamw = _adamw(parameter_groups(self.model, OPTIMIZER.weight_decay))

    def step(self, batch: MicroBatch) -> Tensor:
        loss = _loss(self.engine(input_ids=batch.tokens).logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.detach()

    def force(self, choice: Tensor) -> None:
        for layer in self.model.model.layers:
            layer.mlp.gate.e_score_correction_bias = choice  # broadcasts like a bias of one row


class AutoEP:
    """DeepSpeed's engine around transformers' model, its experts replaced and spread; ZeRO 1."""

    def __init__(self, shape: StepShape, rank: int, ranks: int, grouped: bool, seed: int) -> None:
        from parallel.zero import deepspeed_config, prepare_deepspeed

        deepspeed = prepare_deepspeed("gloo", rank, torch.device("cpu"))
        settings = deepspeed_config(1, "fp32", shape.batch, 1, ranks, "gloo")
        settings |= {
            "gradient_clipping": OPTIMIZER.grad_clip, "expert_parallel": auto_ep_settings(ranks, grouped),
            "optimizer": {"type": "AdamW", "params": {
                "torch_adam": True, "fused": True, "lr": OPTIMIZER.lr, "betas": list(OPTIMIZER.betas),
                "eps": OPTIMIZER.eps, "weight_decay": OPTIMIZER.weight_decay,
            }},
        }  # fmt: skip
        model = hf_model(shape.model(), "eager", seed)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=settings, dist_init_required=False
        )

    def step(self, batch: MicroBatch) -> Tensor:
        loss = _loss(self.engine(input_ids=batch.tokens).logits, batch)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def force(self, choice: Tensor) -> None:
        for layer in self.engine.module.model.layers:
            layer.mlp.expert_bias = choice


@dataclass(frozen=True)
class Way:
    """peer: makes it, of (shape, rank, ranks, seed); None is ours. spreads: experts over all ranks, of ours.

    tuned: with our settings of the C library's allocator, which a peer's user would not have.
    products: with fp32 products through the library that our training takes (kernels/products.py), not torch's own.
    as_launched: with the threads that its own launcher gives a process, not those that the benchmark says. Ours shares
    the cores out; a peer's is taken to leave them to torch, one a core, as DeepSpeed's does unless told to bind cores
    and whoever starts processes by other means. torchrun sets one thread.
    """

    peer: Callable[[StepShape, int, int, int], Peer] | None
    packages: tuple[str, ...] = ("deepspeed",)
    spreads: bool = True
    tuned: bool = True
    as_launched: bool = False
    products: bool = False

    def threads(self, said: int, ranks: int) -> int | None:
        """Of each process; None for what torch takes by itself."""
        if not self.as_launched:
            return said
        return thread_count(0, ranks) if self.peer is None else None


def _auto_ep(grouped: bool, launched: bool = False, products: bool = False) -> Way:
    def make(shape: StepShape, rank: int, ranks: int, seed: int) -> Peer:
        return AutoEP(shape, rank, ranks, grouped, seed)

    return Way(make, ("deepspeed", "transformers"), tuned=not launched, as_launched=launched, products=products)


def _data_parallel(experts: str, tuned: bool = True, launched: bool = False, products: bool = False) -> Way:
    def make(shape: StepShape, rank: int, ranks: int, seed: int) -> Peer:
        return DataParallel(shape, experts, seed)

    return Way(make, ("transformers",), tuned=tuned and not launched, as_launched=launched, products=products)


WAYS: dict[str, Way] = {
    "trimtab": Way(None, products=True),
    "trimtab, ep 1": Way(None, spreads=False, products=True),
    "trimtab, torch's products": Way(None),
    "DeepSpeed AutoEP": _auto_ep(grouped=True),
    "DeepSpeed AutoEP, loop": _auto_ep(grouped=False),
    "transformers eager": _data_parallel("eager"),
    "transformers grouped_mm": _data_parallel("grouped_mm"),
    "AutoEP, our products": _auto_ep(grouped=True, products=True),
    "eager, our products": _data_parallel("eager", products=True),
    "grouped_mm, our products": _data_parallel("grouped_mm", products=True),
    "eager as installed": _data_parallel("eager", tuned=False),
    "trimtab as launched": Way(None, as_launched=True, products=True),
    "AutoEP as launched": _auto_ep(grouped=True, launched=True),
    "AutoEP, loop, as launched": _auto_ep(grouped=False, launched=True),
    "eager as launched": _data_parallel("eager", launched=True),
    "grouped_mm as launched": _data_parallel("grouped_mm", launched=True),
}


def import_packages(packages: tuple[str, ...], rank: int) -> None:
    """Loads what a way needs, so that its programs are not counted as its memory."""
    if "deepspeed" in packages:
        from parallel.zero import prepare_deepspeed

        prepare_deepspeed("gloo", rank, torch.device("cpu"))
    if "transformers" in packages:
        importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")


class OurRun:
    """A session as the launcher's ranks have it, trained by the usual loop in as many calls as there are routings."""

    def __init__(self, config: Config, folder: Path, rank: int) -> None:
        from launch.config import dump
        from launch.runfolder import RunFolder
        from launch.session import assemble

        run = RunFolder(folder / "run")
        if rank == 0:
            run.create(dump(config))
        torch.distributed.barrier()
        ranks = process_ranks(config.parallel.ep_size, 600)
        self.session = assemble(config, run, ranks, CPU, StopFlag(), local_rank=rank)

    def train(self, first: int, steps: int) -> Iterator[dict[str, Any]]:
        """Trains from step `first` to `steps`; what metrics.jsonl says of each, on rank 0."""
        from launch.runfolder import committed_metrics
        from launch.train import train

        session = self.session
        session.config = replace(session.config, train=replace(session.config.train, steps=steps))
        train(session, first)
        if session.ranks.dp.rank == 0:
            yield from (one for one in committed_metrics(session.run) if one["step"] > first)

    def force(self, choice: Tensor) -> None:
        """As Peer.force."""
        for module in self.session.model.modules():
            if isinstance(module, Router):
                module.choose = lambda scores, bias, config: choose_experts(scores, choice, config)
