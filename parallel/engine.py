"""What the train loop drives: forward, backward, one optimizer step, and a view of the state for checkpoints.

Two implementations: `PlainEngine` here (torch's AdamW on one rank or on virtual ranks, nothing else installed) and
`parallel.zero.ZeroEngine` (DeepSpeed).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from model.naming import is_expert
from parallel.collective_waits import Waits
from parallel.communicator import Communicator
from parallel.config import OptimizerConfig
from parallel.layout import Layout, slice_bounds
from parallel.schedule import decays

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShard:
    """A run of one local parameter's state that this rank answers for.

    parameter: the local parameter's name; shape: its whole local shape.
    kind: `weight` (the fp32 master), `exp_avg` or `exp_avg_sq` (AdamW's moments).
    start: first element, in the flattened local parameter.
    values: (n,) fp32 view of the live state; writing into it changes the state.
    """

    parameter: str
    shape: tuple[int, ...]
    kind: Kind
    start: int
    values: Tensor


class Engine(Protocol):
    """One rank's model and optimizer. Every method is collective."""

    module: nn.Module
    optimizer_steps: int
    waits: Waits  # in collectives that are not a communicator's

    def forward(self, **inputs: Any) -> Any:
        """Runs the model."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`, this rank's share of a loss that is the sum over ranks and micro-steps.

        last: whether this is the step's last micro-step, after which gradients are reduced over ranks.
        """
        ...

    def grad_norm(self) -> float:
        """The true global L2 norm of the reduced gradients, the same on every rank; may be inf or nan."""
        ...

    def step(self, lr: float) -> None:
        """Clips by the global norm and applies AdamW."""
        ...

    def skip(self) -> None:
        """Forgets the step's gradients and leaves weights and moments as they are."""
        ...

    def state_shards(self) -> Iterator[StateShard]:
        """This rank's share of the state: over all ranks, every element of every parameter exactly once."""
        ...

    def load_state(self, read: Callable[[StateShard], Tensor], optimizer_steps: int) -> None:
        """Fills the state from `read(shard)` -> (n,) fp32, and brings the model's working weights in line."""
        ...


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors do not. Each has a `name`, as DeepSpeed wants it."""
    matrices = [parameter for name, parameter in module.named_parameters() if decays(name, parameter)]
    vectors = [parameter for name, parameter in module.named_parameters() if not decays(name, parameter)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def fresh_moments(weights: Tensor, steps: int) -> dict[str, Tensor]:
    """AdamW's state for one tensor after `steps` steps, moments zero, as torch.optim.AdamW(fused=True) keeps it."""
    return {
        "step": torch.tensor(float(steps), dtype=torch.float32, device=weights.device),
        "exp_avg": torch.zeros_like(weights),
        "exp_avg_sq": torch.zeros_like(weights),
    }


class PlainEngine:
    """Full optimizer state on every rank; gradients summed over ranks in order of rank. For debugging.

    Args:
        module: the local model, fp32.
        config: AdamW's settings.
        layout: this rank's place.
        dp: all ranks. edp: the ranks that hold the same experts.
        precision: `fp32`, or `bf16` for autocast over fp32 weights.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        layout: Layout,
        dp: Communicator,
        edp: Communicator,
        precision: str = "fp32",
    ) -> None:
        self.module = module
        self.config = config
        self.layout = layout
        self.dp = dp
        self.edp = edp
        self.precision = precision
        self.optimizer_steps = 0
        self.waits = Waits()
        self._parameters = dict(module.named_parameters())
        self._norm = 0.0
        self._adamw = torch.optim.AdamW(
            parameter_groups(module, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        for parameter in self._parameters.values():
            self._adamw.state[parameter] = fresh_moments(parameter.data, 0)

    def forward(self, **inputs: Any) -> Any:
        """Runs the model, under autocast when precision is bf16."""
        device = next(iter(self._parameters.values())).device.type
        cast = torch.autocast(device, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with cast:
            return self.module(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates in `.grad`; after the last micro-step sums over the ranks that hold the same parameter."""
        loss.backward()
        if not last:
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            group = self.edp if is_expert(name) else self.dp
            if group.size > 1:
                group.all_reduce(parameter.grad)
        self._norm = self._global_norm()

    def _global_norm(self) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for name, parameter in self._parameters.items():
            copies = self.layout.edp_size if is_expert(name) else self.layout.world_size
            if parameter.grad is not None:
                total += parameter.grad.double().square().sum().cpu() / copies
        return float(self.dp.all_reduce(total).sqrt())

    def grad_norm(self) -> float:
        """The norm found by the last `backward`."""
        return self._norm

    def step(self, lr: float) -> None:
        """Clips, applies AdamW at `lr`, clears gradients."""
        if self.config.grad_clip > 0 and self._norm > self.config.grad_clip:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.config.grad_clip / self._norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.optimizer_steps += 1

    def skip(self) -> None:
        """Clears gradients only."""
        self._adamw.zero_grad(set_to_none=True)

    def state_shards(self) -> Iterator[StateShard]:
        """An even slice of each parameter among the ranks that hold a copy of it."""
        for shard in self._whole():
            holders, mine = (
                (self.layout.edp_size, self.layout.edp_rank)
                if is_expert(shard.parameter)
                else (self.layout.world_size, self.layout.rank)
            )
            start, stop = slice_bounds(shard.values.numel(), holders, mine)
            if stop > start:
                yield StateShard(shard.parameter, shard.shape, shard.kind, start, shard.values[start:stop])

    def _whole(self) -> Iterator[StateShard]:
        for name, parameter in self._parameters.items():
            state = self._adamw.state[parameter]
            for kind in KINDS:
                values = parameter.data if kind == "weight" else state[kind]
                yield StateShard(name, tuple(parameter.shape), kind, 0, values.view(-1))

    def load_state(self, read: Callable[[StateShard], Tensor], optimizer_steps: int) -> None:
        """Every rank reads its whole parameters: there is nothing to gather afterwards."""
        for shard in self._whole():
            shard.values.copy_(read(shard))
        for parameter in self._parameters.values():
            self._adamw.state[parameter]["step"].fill_(float(optimizer_steps))
        self.optimizer_steps = optimizer_steps
