"""Runs for the exactness contract of balance: the real train loop under scripted routing, at any layout.

Rounding may flip a choice at a near-tie, so that runs at two layouts are not bound to choose alike. Here a router's
input is replaced by small integers that are a function of layer, token and position alone, and its weights by multiples
of a power of two: every product is exact in whatever order it is summed, the same token has the same scores at every
layout, and all that follows has to be equal bit for bit.
"""

# B batch, S seq, D hidden, E routed experts, M MoE layers (prediction modules included)

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cluster.flag import StopFlag
from data.config import DataConfig
from data.stream import MicroBatch
from launch.config import CheckpointConfig, Config, TelemetryConfig, TrainConfig
from launch.evaluate import predict
from launch.runfolder import RunFolder
from launch.session import Session, assemble
from launch.train import train
from model.config import ModelConfig
from model.generate import generate
from model.init import init_weights
from parallel.config import BalanceConfig, OptimizerConfig, ParallelConfig
from parallel.ranks import Ranks, single_rank, virtual_ranks
from parallel.threads import run_virtual_ranks

SEQUENCES, LENGTH = 8, 64  # of a global batch: enough tokens that bf16 (exact up to 256) cannot count a favourite's

# 32 experts: any number of tokens fills whole vectors of the processor, whose last, partial one rounds a sigmoid
# otherwise than the full ones do.
MODEL = ModelConfig(
    vocab_size=257, hidden_size=32, num_hidden_layers=1, num_nextn_predict_layers=1, num_attention_heads=1,
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32,
    moe_intermediate_size=8, first_k_dense_replace=0, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=2,
    max_position_embeddings=LENGTH,
)  # fmt: skip


class Layout(NamedTuple):
    """How a global batch is cut up."""

    world: int
    ep_size: int = 1
    micro_batch_size: int = SEQUENCES
    recompute: bool = False
    zero_stage: int = 0  # real processes only


ALONE = Layout(1)


@dataclass(frozen=True)
class Scenario:
    """A run: its balance, the layouts that it goes through, and what must not leave a trace.

    segments: (layout, steps done at its end); from one to the next the run is saved and resumed.
    skips: steps, 0-based, whose loss is not a number. interludes: steps before which all ranks evaluate and generate.
    grouped: whether a token may only choose inside two of four groups of experts. mtp: prediction modules.
    padded: whether parts of sequences, and whole ones, are padding.
    scripted: whether routers see the script and weights stand still; else everything is trained.
    """

    balance: BalanceConfig
    segments: tuple[tuple[Layout, int], ...] = ((ALONE, 4),)
    skips: frozenset[int] = frozenset()
    interludes: frozenset[int] = frozenset()
    grouped: bool = False
    mtp: int = 1
    padded: bool = False
    scripted: bool = True

    def alone(self) -> "Scenario":
        """The same steps by one rank in one go, with nothing in between."""
        return replace(self, segments=((ALONE, self.segments[-1][1]),), interludes=frozenset())

    def config(self, data: Path, layout: Layout, steps: int) -> Config:
        """The run's configuration at one layout."""
        groups, kept = (4, 2) if self.grouped else (1, 1)
        return Config(
            model=replace(MODEL, num_nextn_predict_layers=self.mtp, n_group=groups, topk_group=kept),
            data=DataConfig(path=str(data), seq_len=LENGTH),
            parallel=ParallelConfig(
                ep_size=layout.ep_size, zero_stage=layout.zero_stage, recompute=layout.recompute  # type: ignore[arg-type]
            ),
            optimizer=OptimizerConfig(lr=0.0 if self.scripted else 3e-3, warmup_steps=0, schedule="constant"),
            train=TrainConfig(
                steps=steps, global_batch_size=SEQUENCES, micro_batch_size=layout.micro_batch_size
            ),
            balance=self.balance,
            checkpoint=CheckpointConfig(every_steps=2 if self.balance.placement == "load" else 1000),
            telemetry=TelemetryConfig(console="off", heatmap_every_steps=1000),
        )  # fmt: skip


class Step(NamedTuple):
    """What one rank knew at the end of a step."""

    step: int  # 0-based
    counts: list[list[int]]  # (M, E)
    bias: list[list[float]]  # (M, E), after the step
    rate: float
    loss: float
    norm: float


class Script:
    """What routers see in place of hidden states, and their weights.

    Logits are multiples of 1/1024 below 32, exact in fp32 however they are summed; no two of a token are equal. One
    expert of each layer is favoured by four.
    """

    def __init__(self, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(11)
        rows, width, experts = len(config.moe_layers), config.hidden_size, config.n_routed_experts

        def integers(reach: int, *shape: int) -> Tensor:
            return torch.randint(-reach, reach + 1, shape, generator=generator).float()

        self.of_token = integers(1, rows, config.vocab_size, width)
        self.of_position = integers(1, rows, config.max_position_embeddings, width)
        self.weight = integers(2, rows, experts, width) / 8
        self.of_token[..., 0], self.of_position[..., 0] = 1.0, 0.0
        self.weight[..., 0] = torch.arange(experts) / 1024
        for row in range(rows):
            self.weight[row, (5 * row + 1) % experts, 0] += 4.0

    def features(self, row: int, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, D), integers from -2 to 2."""
        return self.of_token[row, tokens] + self.of_position[row, : tokens.shape[1]]

    def scores(self, row: int, features: Tensor) -> Tensor:
        """(..., D) -> (..., E) fp32."""
        return (features @ self.weight[row].T).sigmoid()


class Prompter:
    """Feeds the script to a model's routers, and looks at what they make of it.

    A recomputed forward gets the script with the opposite sign, as if rounding had turned every choice round: it has to
    stay with the choices of the first forward.
    """

    def __init__(self, model: nn.Module, script: Script, config: ModelConfig) -> None:
        self.script, self.config = script, config
        self.tokens = torch.zeros(0, dtype=torch.int64)
        model.register_forward_pre_hook(self._hear, with_kwargs=True)
        for row, path in enumerate(config.moe_layers):
            gate = model.get_submodule(f"{path}.mlp.gate")
            gate.register_forward_pre_hook(partial(self._prompt, row))
            gate.register_forward_hook(partial(self._look, row))

    def _hear(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens = kwargs["tokens"] if "tokens" in kwargs else args[0]

    def _prompt(self, row: int, gate: nn.Module, args: tuple) -> tuple:
        hidden, memory, real = args if len(args) == 3 else (*args, None)
        if memory is None:  # generation through a cache: its choices are its own, and count nowhere
            return args
        depth = max(0, row - self.config.num_hidden_layers + 1)
        features = self.script.features(row, self.tokens[:, depth:])
        if real is not None:
            features = real.take(features.flatten(0, 1))
        again = memory is not None and memory.topk_ids is not None
        return (-features if again else features).requires_grad_(hidden.requires_grad), memory, real

    @torch.no_grad()
    def _look(self, row: int, gate: nn.Module, args: tuple, outputs: tuple) -> None:
        features, memory = args[:2]
        ids, weights = outputs[:2]
        if memory is None:
            return
        first = memory.__dict__.setdefault("first_choice", ids)
        assert torch.equal(ids, first), f"MoE layer {row}: a recomputed forward made another choice than the first"
        chosen = self.script.scores(row, features.reshape(-1, features.shape[-1])).gather(1, ids)
        expected = chosen / chosen.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        assert torch.allclose(weights, expected, rtol=1e-5), f"MoE layer {row}: weights are not those of plain scores"
        assert outputs[2].dtype == torch.int64, f"MoE layer {row}: tokens are counted in {outputs[2].dtype}"


def follow(scenario: Scenario, session: Session) -> list[Step]:
    """Has a session run the scenario; returns the list that its steps are going to be in."""
    steps: list[Step] = []
    now = [0]
    read, log = session.stream.read, session.telemetry.log_step
    if scenario.scripted:
        Prompter(session.model, Script(session.config.model), session.config.model)

    def reading(step: int) -> Any:
        now[0] = -1
        if step in scenario.interludes:
            interlude(session)
        now[0] = step
        return [pad(batch) for batch in read(step)] if scenario.padded else read(step)

    def poisoned(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return output * math.nan if now[0] in scenario.skips else None

    def logged(record: Any) -> None:
        assert math.isnan(record.loss) == (record.step - 1 in scenario.skips)
        counts, bias = record.tokens_per_expert, record.expert_bias
        assert counts.dtype == torch.int64, f"the balancer counts in {counts.dtype}"
        assert bias.dtype == torch.float32
        figures = (record.bias_rate, record.loss, record.grad_norm)
        steps.append(Step(record.step - 1, counts.tolist(), bias.tolist(), *figures))
        log(record)

    session.model.embed_tokens.register_forward_hook(poisoned)
    session.stream.read = reading  # type: ignore[method-assign]
    session.telemetry.log_step = logged  # type: ignore[method-assign]
    return steps


def pad(batch: MicroBatch) -> MicroBatch:
    """The batch with padding for parts of it, by the sequences' numbers: all of every third one, the ends of others."""
    length = batch.tokens.shape[1]
    kept = torch.where(batch.sequence_ids % 3 == 0, 0, batch.sequence_ids * 5 % length + 1).unsqueeze(1)
    real = torch.arange(length) < kept
    return batch._replace(
        tokens=torch.where(real, batch.tokens, 256), loss_mask=batch.loss_mask & real, real=batch.real & real
    )


def interlude(session: Session) -> None:
    """Evaluation and generation by all ranks, as a user may have them between steps."""
    assert session.feed.dataset is not None
    document = next(session.feed.dataset.heldout_documents())
    predict(session.model, [replace(document, tokens=document.tokens[:90])], eod_id=256, window=LENGTH)
    assert len(list(generate(session.model, [65, 66], max_new_tokens=2))) == 2


@contextmanager
def prepared(scenario: Scenario) -> Iterator[None]:
    """Start values by the script, and no measurement of the machine's speed: nobody reads what it is for."""

    def scripted(model: Any, seed: int) -> None:
        init_weights(model, seed)
        script = Script(model.config)
        for row, path in enumerate(model.config.moe_layers):
            model.get_submodule(f"{path}.mlp.gate").weight.data.copy_(script.weight[row])

    with ExitStack() as stack:
        stack.enter_context(patch("launch.train.peak_flops", lambda device, precision: (1.0, "not measured")))
        if scenario.scripted:
            stack.enter_context(patch("launch.session.init_weights", scripted))
        yield


def segment(
    scenario: Scenario, number: int, data: Path, folder: Path, ranks: Ranks, *, plain: bool = True, hook: Any = None
) -> list[Step]:
    """One rank's part of one segment."""
    layout, until = scenario.segments[number]
    config = scenario.config(data, layout, until)
    run = RunFolder(folder)
    session = assemble(config, run, ranks, torch.device("cpu"), StopFlag(), local_rank=ranks.dp.rank, plain=plain)
    try:
        steps = follow(scenario, session)
        if hook:
            hook(session)
        train(session, session.resume("must" if number else "never", []))
    finally:
        session.close()
    return steps


def play(scenario: Scenario, data: Path, folder: Path, hook: Any = None) -> list[Step]:
    """Runs a scenario on virtual ranks, and sees to it that all ranks know the same.

    Args:
        data: a packed dataset. folder: of the run; made here, must be new.
        hook: called with each rank's session before it trains.
    """
    RunFolder(folder).create("")
    steps: list[Step] = []
    with prepared(scenario):
        for number, (layout, _) in enumerate(scenario.segments):

            def work(world: Any, rank: int, number: int = number, layout: Layout = layout) -> list[Step]:
                ranks = single_rank() if layout.world == 1 else virtual_ranks(world, layout.ep_size, rank)
                return segment(scenario, number, data, folder, ranks, hook=hook)

            by_rank = run_virtual_ranks(layout.world, work)
            for rank, other in enumerate(by_rank):
                for mine, first in zip(other, by_rank[0], strict=True):
                    assert repr(mine) == repr(first), f"rank {rank} of {layout} knows step {mine.step} otherwise"
            steps += by_rank[0]
    return steps


def play_processes(rank: int, world_size: int, payload: dict[str, Any]) -> list[list[Step]]:
    """The same on real ranks under ZeRO, several scenarios in one set of processes: payload["folders"], one each.

    Args:
        payload: scenarios (names in `PROCESS_SCENARIOS`), data, folders.
    """
    from parallel.ranks import process_ranks

    results = []
    for name, folder in zip(payload["scenarios"], payload["folders"], strict=True):
        scenario = PROCESS_SCENARIOS[name]
        steps: list[Step] = []
        with prepared(scenario):
            for number, (layout, _) in enumerate(scenario.segments):
                ranks = process_ranks(layout.ep_size, 120)
                if rank == 0:
                    RunFolder(Path(folder)).create("")
                ranks.dp.barrier()
                closing: list[Any] = []
                steps += segment(
                    scenario, number, Path(payload["data"]), Path(folder), ranks, plain=False,
                    hook=lambda session, closing=closing: closing.append(session.engine),
                )  # fmt: skip
                closing[0].close()
        results.append(steps)
    return results


_QUANTILE, _AUX_LOSS = BalanceConfig(rule="quantile", rate=0.5), BalanceConfig(rule="aux_loss", aux_loss_coef=0.1)
_STAGE = {stage: Layout(2, 2, 2, recompute=True, zero_stage=stage) for stage in (1, 2, 3)}
PROCESS_SCENARIOS = {
    "quantile, stages 1 and 3": Scenario(_QUANTILE, ((_STAGE[1], 2), (_STAGE[3], 4)), skips=frozenset({2})),
    "aux_loss, stage 1": Scenario(_AUX_LOSS, ((_STAGE[1], 3),), scripted=False),
    "aux_loss, stage 2": Scenario(_AUX_LOSS, ((_STAGE[2], 2),), scripted=False),
    "aux_loss, stage 3": Scenario(_AUX_LOSS, ((_STAGE[3], 3),), scripted=False),
}
