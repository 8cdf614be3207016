"""One MoE layer of each kind from the same weights: ours, transformers', DeepSpeed's AutoEP and its native MoE."""

# D hidden, E experts, L local experts, I expert width

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench_hf import hf_config
from model.config import ModelConfig
from model.moe import MoE
from parallel.config import ParallelConfig
from parallel.exchange import make_exchange
from parallel.ranks import process_ranks

SCALE = 2.5  # routed_scaling_factor


@dataclass(frozen=True)
class LayerShape:
    """What is measured. busiest: tokens of the busiest expert on any rank, by routing; a peer may want to know."""

    batch: int = 4
    seq_len: int = 512
    hidden: int = 256
    width: int = 128
    experts: int = 16
    top_k: int = 4

    def model(self) -> ModelConfig:
        """A model that has this layer."""
        return ModelConfig(
            hidden_size=self.hidden, moe_intermediate_size=self.width, n_routed_experts=self.experts,
            num_experts_per_tok=self.top_k, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=0,
            num_hidden_layers=1, num_nextn_predict_layers=0, routed_scaling_factor=SCALE, vocab_size=64,
        )  # fmt: skip


def draw_weights(shape: LayerShape) -> dict[str, Tensor]:
    """The layer's weights, the same on every rank: gate (E, D), gate_up (E, 2I, D), down (E, D, I), and one shared
    expert's shared_gate, shared_up (I, D), shared_down (D, I)."""
    generator = torch.Generator().manual_seed(11)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) / size[-1] ** 0.5

    d, i, e = shape.hidden, shape.width, shape.experts
    return {
        "gate": normal(e, d), "gate_up": normal(e, 2 * i, d), "down": normal(e, d, i),
        "shared_gate": normal(i, d), "shared_up": normal(i, d), "shared_down": normal(d, i),
    }  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """run: (B, S, D) -> (B, S, D). softmax: whether the weights of the choice are a softmax's and not sigmoid's.
    exposed: seconds that this rank waited for transfers since the last call, where it is known."""

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    softmax: bool = False
    exposed: Callable[[], float] | None = None


def ours(shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, _: dict[str, int]) -> Layer:
    """This project's layer, with the default exchange."""
    ranks = process_ranks(ep_size, 600)
    config = ParallelConfig(ep_size=ep_size)
    module = MoE(shape.model(), make_exchange(config, ranks))
    mine = slice(rank * shape.experts // ep_size, (rank + 1) * shape.experts // ep_size)
    shared = module.shared_experts
    assert shared is not None
    _fill(
        [module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj, shared.gate_proj.weight,
         shared.up_proj.weight, shared.down_proj.weight],
        [weights["gate"], weights["gate_up"][mine], weights["down"][mine], weights["shared_gate"],
         weights["shared_up"], weights["shared_down"]],
    )  # fmt: skip

    def exposed() -> float:
        return ranks.ep.traffic.reset().exposed_seconds

    return Layer(lambda x: module(x)[0], list(module.parameters()), exposed=exposed if ep_size > 1 else None)


def transformers_layer(shape: LayerShape, weights: dict[str, Tensor], experts: str) -> Any:
    """A DeepseekV3MoE with these weights."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    module = DeepseekV3MoE(hf_config(shape.model(), experts)).float()
    shared = module.shared_experts
    _fill(
        [module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj, shared.gate_proj.weight,
         shared.up_proj.weight, shared.down_proj.weight],
        list(weights.values()),
    )  # fmt: skip
    return module.train()


def transformers_eager(
    shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, _: dict[str, int]
) -> Layer:
    """A loop over experts."""
    module = transformers_layer(shape, weights, "eager")
    return Layer(module, list(module.parameters()))


def transformers_grouped(
    shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, _: dict[str, int]
) -> Layer:
    """torch's grouped_mm."""
    module = transformers_layer(shape, weights, "grouped_mm")
    return Layer(module, list(module.parameters()))


def auto_ep_settings(ep_size: int, grouped: bool) -> dict[str, Any]:
    """DeepSpeed's `expert_parallel` section. Without route_norm its preset leaves out the division by the sum."""
    settings = {
        "enabled": True, "autoep_size": ep_size, "preset_model": "deepseek_v3", "route_norm": True,
        "use_grouped_mm": grouped,
    }  # fmt: skip
    return settings


def auto_ep(
    shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, _: dict[str, int], grouped: bool = True
) -> Layer:
    """DeepSpeed's replacement of a transformers layer, put in by the functions that its engine calls."""
    from parallel.zero import prepare_deepspeed

    prepare_deepspeed("gloo", rank, torch.device("cpu"))
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.utils import groups

    holder = nn.Module()
    holder.config = hf_config(shape.model(), "eager")
    holder.model = nn.Module()
    block = nn.Module()
    block.mlp = transformers_layer(shape, weights, "eager")
    holder.model.layers = nn.ModuleList([block])
    groups._create_expert_and_data_parallel(ep_size)
    replacer = AutoEP(holder, parse_autoep_config(auto_ep_settings(ep_size, grouped)))
    replacer.replace_moe_layers(replacer.ep_parser(), ep_size=ep_size, ep_rank=rank % ep_size)
    layer: Any = block.mlp
    layer.set_deepspeed_parallelism()
    return Layer(layer, list(layer.parameters()))


def auto_ep_loop(
    shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, busiest: dict[str, int]
) -> Layer:
    """The same with `use_grouped_mm` false: a loop over experts."""
    return auto_ep(shape, weights, rank, ep_size, busiest, grouped=False)


class _Expert(nn.Module):
    """What deepspeed.moe is given as an expert: SwiGLU with gate and up in one product."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def native_moe(
    shape: LayerShape, weights: dict[str, Tensor], rank: int, ep_size: int, busiest: dict[str, int]
) -> Layer:
    """deepspeed.moe.layer.MoE: every expert padded to the busiest one's tokens.

    With one rank drop_tokens is False. With several that fails for top-k above 2 (0.19.8: the ranks do not agree on
    the capacity), so the capacity is given, the least that drops nothing, which a user would not know.
    """
    from parallel.zero import prepare_deepspeed

    prepare_deepspeed("gloo", rank, torch.device("cpu"))
    from deepspeed.moe.layer import MoE as NativeMoE

    tokens = shape.batch * shape.seq_len
    module = NativeMoE(
        shape.hidden, _Expert(shape.hidden, shape.width), num_experts=shape.experts, ep_size=ep_size, k=shape.top_k,
        drop_tokens=ep_size > 1, use_rts=False, min_capacity=0,
    )  # fmt: skip
    module.set_deepspeed_parallelism()
    moe = module.deepspeed_moe
    shared = _Expert(shape.hidden, shape.width)
    _fill([moe.gate.wg.weight, shared.gate_up.weight, shared.down.weight], [
        weights["gate"], torch.cat([weights["shared_gate"], weights["shared_up"]]), weights["shared_down"],
    ])  # fmt: skip
    first = rank % ep_size * shape.experts // ep_size
    for number, expert in enumerate(moe.experts.deepspeed_experts, first):
        _fill([expert.gate_up.weight, expert.down.weight], [weights["gate_up"][number], weights["down"][number]])

    def run(x: Tensor) -> Tensor:
        # capacity = ceil(tokens / experts * factor * k)
        moe.gate.capacity_factor = (busiest["now"] - 0.5) * shape.experts / (tokens * shape.top_k)
        return module(x)[0] * SCALE + shared(x)

    return Layer(run, [*module.parameters(), *shared.parameters()], softmax=True)


@torch.no_grad()
def _fill(parameters: list[Any], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@dataclass(frozen=True)
class Way:
    """A layer that is measured: how it is made, what must be installed, whether its experts may be on several ranks."""

    build: Callable[[LayerShape, dict[str, Tensor], int, int, dict[str, int]], Layer]
    packages: tuple[str, ...] = ()
    spreads: bool = True


WAYS: dict[str, Way] = {
    "trimtab": Way(ours),
    "transformers eager": Way(transformers_eager, ("transformers",), spreads=False),
    "transformers grouped_mm": Way(transformers_grouped, ("transformers",), spreads=False),
    "DeepSpeed AutoEP": Way(auto_ep, ("deepspeed", "transformers")),
    "DeepSpeed AutoEP, loop": Way(auto_ep_loop, ("deepspeed", "transformers")),
    "DeepSpeed MoE": Way(native_moe, ("deepspeed",)),
}
