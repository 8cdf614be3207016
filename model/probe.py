"""Finds the first non-finite number: which layer, which tensor, which expert, forward or backward."""

# R received rows, L local experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.block import Block
from model.layers import Embedding, Head
from model.mlp import MLP
from model.moe import Experts, MoE
from model.mtp import MultiTokenPrediction
from model.router import Router
from model.transformer import Transformer


class NonFiniteError(FloatingPointError):
    """A tensor that crossed a layer holds NaN or infinity.

    Attributes:
        layer: module path of the decoder layer, e.g. `layers.3` or `mtp.0.block`; `model` outside of them.
        tensor: which one, e.g. `mlp.experts output` or `gradient of self_attn output`.
        expert: global number of the routed expert whose row it is, or None.
    """

    def __init__(self, layer: str, tensor: str, expert: int | None, detail: str) -> None:
        where = f"{layer}: {tensor}" + ("" if expert is None else f", expert {expert}")
        super().__init__(
            f"{where} is not finite ({detail}); look at this layer's inputs and weights with a breakpoint, or lower "
            "optimizer.lr and check the data if it appears only after some steps"
        )
        self.layer, self.tensor, self.expert = layer, tensor, expert


class ProbeHandle:
    """Takes the probes off again."""

    def __init__(self, hooks: list[torch.utils.hooks.RemovableHandle], inspected: list[Experts]) -> None:
        self._hooks = hooks
        self._inspected = inspected

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for experts in self._inspected:
            experts.inspect = None


def attach(
    model: Transformer,
    found: Callable[[NonFiniteError], None] | None = None,
    checked: Callable[[], None] | None = None,
) -> ProbeHandle:
    """Check every tensor that leaves a part of a layer, and every gradient that enters it, until removed.

    On a GPU each check waits for the device, so this is for finding a fault and not for training.

    Args:
        found: called with each number that is not finite, where the pass is to go on. None raises it, inside the
            forward or backward that meets it first.
        checked: called before each check.

    Raises (later, from the model's forward or backward):
        NonFiniteError: with `found` None.
    """
    kinds = (Attention, Block, Embedding, Head, MLP, MoE, MultiTokenPrediction, Router)
    check = _checker(found, checked)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    inspected: list[Experts] = []
    for name, module in model.named_modules():
        layer, part = layer_and_part(name)
        if isinstance(module, Experts):
            owner = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(owner, MoE)
            module.inspect = _experts_look(layer, part, owner, check)
            inspected.append(module)
        elif isinstance(module, kinds):
            hooks.append(module.register_forward_hook(_hook(layer, part, check)))
    return ProbeHandle(hooks, inspected)


def layer_and_part(name: str) -> tuple[str, str]:
    """The decoder layer of a module or parameter, and where it is in it.

    `layers.3.mlp.gate` -> (`layers.3`, `mlp.gate`); `lm_head` -> (`model`, `lm_head`)."""
    parts = name.split(".")
    length = {"layers": 2, "mtp": 3 if parts[2:3] == ["block"] else 2}.get(parts[0], 0)
    return ".".join(parts[:length]) or "model", ".".join(parts[length:])


Check = Callable[..., None]  # the arguments of `_check`


def _checker(found: Callable[[NonFiniteError], None] | None, checked: Callable[[], None] | None) -> Check:
    def check(*arguments: Any) -> None:
        if checked is not None:
            checked()
        try:
            _check(*arguments)
        except NonFiniteError as error:
            if found is None:
                raise
            found(error)

    return check


def _hook(layer: str, part: str, check: Check) -> Callable[[nn.Module, Any, Any], None]:
    label = f"{part} output" if part else "output"

    def look(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            check(tensor, layer, label)
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: check(grad, layer, f"gradient of {label}"))

    return look


def _experts_look(layer: str, part: str, owner: MoE, check: Check) -> Callable[[str, Tensor, tuple[int, ...]], None]:
    def look(what: str, rows: Tensor, rows_per_expert: tuple[int, ...]) -> None:
        numbers = owner.local_experts
        check(rows, layer, f"{part} {what}", rows_per_expert, numbers)
        if what == "output" and rows.requires_grad:
            rows.register_hook(lambda grad: check(grad, layer, f"gradient of {part} output", rows_per_expert, numbers))

    return look


def _check(
    tensor: Tensor,
    layer: str,
    label: str,
    rows_per_expert: tuple[int, ...] | None = None,
    numbers: tuple[int, ...] = (),
) -> None:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return
    bad = ~torch.isfinite(tensor.detach())
    expert = None
    if rows_per_expert is not None:
        expert = _expert_of_row(int(bad.any(-1).nonzero()[0]), rows_per_expert, numbers)
    position = tuple(bad.nonzero()[0].tolist()) if bad.dim() else ()
    detail = f"{int(bad.sum())} of {bad.numel()} numbers, the first at {position} of shape {tuple(tensor.shape)}"
    raise NonFiniteError(layer, label, expert, detail)


def _expert_of_row(row: int, rows_per_expert: tuple[int, ...], numbers: tuple[int, ...]) -> int | None:
    end = 0
    for number, count in zip(numbers, rows_per_expert, strict=True):
        end += count
        if row < end:
            return number
    return None  # a padding row
