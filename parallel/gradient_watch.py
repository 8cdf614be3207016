"""Remembers which gradients of this rank were not finite before the ranks' were added up, and of which micro-step.

Afterwards nobody can tell: the sum is the same on every rank. Each parameter's gradient is summed when it is complete,
one pass over memory that is still in the cache; nobody looks at the sums until a step turns out not to be finite.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.naming import is_expert


@dataclass(frozen=True)
class BadGradient:
    """The first gradient of a rank that was not finite.

    micro_step: from 0. order: how many gradients of that micro-step were complete before it; backward goes from the
    output to the input. slot: which of the stacked experts of this rank, None for other parameters.
    """

    micro_step: int
    order: int
    parameter: str
    slot: int | None


class GradientWatch:
    """Watches every parameter of a module. Make it before the engine, whose own hooks may take gradients away."""

    def __init__(self, module: nn.Module) -> None:
        self._sums: list[dict[str, Tensor]] = []  # by micro-step; by parameter, in the order of completion
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        stacked = is_expert(name)

        def note(parameter: Tensor) -> None:
            if parameter.grad is not None and self._sums:
                gradient = parameter.grad.detach()
                self._sums[-1][name] = gradient.flatten(1).sum(1) if stacked else gradient.sum()

        return note

    def begin(self, micro_step: int) -> None:
        """Micro-step `micro_step` of a step begins; 0 forgets the step before."""
        if micro_step == 0:
            self._sums.clear()
        self._sums.append({})

    def first(self) -> BadGradient | None:
        """The first of this step; waits for the device."""
        for micro_step, sums in enumerate(self._sums):
            for order, (name, total) in enumerate(sums.items()):
                bad = ~torch.isfinite(total)
                if bool(bad.any()):
                    slot = int(bad.nonzero()[0]) if is_expert(name) else None
                    return BadGradient(micro_step, order, name, slot)
        return None
