"""Mixture of experts without gradients and statistics: for the few tokens of a decoding step, and for prompts."""

# T tokens, D hidden, E routed experts, K top-k, N = T*K choices, I expert width

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.experts import experts_mlp
from kernels.products import linear
from kernels.quantized import quantized_linear
from model.exchange import sort_choices
from model.inference import Function, linear_function
from model.mlp import MLP
from model.moe import Experts, MoE
from model.quantize import QuantizedExperts
from model.router import choose_experts, weigh

# Above so many tokens the kernels for many rows are as fast, and on a GPU faster.
FEW = 64
# Up to so many tokens the products of a stack of experts take as long as reading the weights.
_READS = 16


class FeedForward:
    """A layer's feed-forward for tokens (T, D) -> (T, D), dense or with experts; nothing is counted.

    Weights are looked up once and not at each token: for a small model that costs as much as the products.
    """

    def __init__(self, module: MLP | MoE) -> None:
        self._dense: tuple[Function, ...] = ()
        self._moe: MoE | None = None
        if isinstance(module, MLP):
            self._dense = tuple(map(linear_function, (module.gate_proj, module.up_proj, module.down_proj)))
        else:
            self._moe = module
        self._products: list[tuple[Function, Function]] = []
        self._stacked: tuple[Tensor, Tensor] | None = None
        self._shared: FeedForward | None = None
        if self._moe is not None and self._moe.exchange.ep_size == 1:
            experts = self._moe.experts
            self._gate = self._moe.gate.weight.detach().float().t()  # (D, E)
            self._products = _products(experts)
            if isinstance(experts, Experts):
                self._stacked = experts.gate_up_proj.detach(), experts.down_proj.detach()
            if self._moe.shared_experts is not None:
                self._shared = FeedForward(self._moe.shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """With experts on other ranks, or for many tokens on a GPU, the layer's own forward runs."""
        if self._moe is None:
            gate, up, down = self._dense
            return down(F.silu(gate(x)).mul_(up(x)))
        n_tokens = x.shape[0]
        many, stacked = n_tokens > FEW, self._stacked
        elsewhere = many and (stacked is None or x.device.type != "cpu")
        if not self._products or elsewhere or self._moe.experts.inspect is not None:
            # Its kernels may be measured at their first call, with gradients, which inference tensors cannot have.
            with torch.inference_mode(False), torch.no_grad():
                return self._moe(x.clone().unsqueeze(0))[0].squeeze(0)
        ids, weights = self._route(x)
        if n_tokens == 1:
            out = self._one(x, ids, weights)
        elif stacked is not None and n_tokens <= _READS and ids.numel() >= len(self._products):
            out = self._all(x, ids, weights, *stacked)
        elif stacked is not None and many:
            out = self._many(x, ids, weights, *stacked)
        else:
            out = self._several(x, ids, weights)
        return out if self._shared is None else out.add_(self._shared.forward(x))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (T, K) int64 and weights (T, K) fp32, as model/router.py chooses them."""
        moe = self._moe
        assert moe is not None
        config = moe.gate.config
        logits = torch.mm(x.float(), self._gate)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        bias = moe.gate.e_score_correction_bias if config.uses_bias else None
        ids = (moe.gate.choose or choose_experts)(scores, bias, config)
        weights = weigh(scores, ids, config)
        return (ids if moe.slot_of_expert is None else moe.slot_of_expert[ids]), weights

    def _one(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Of one token, the weighted sum of its experts' results.

        Products go straight from each expert's weights: gathering the weights first copies them, which takes twice as
        long for experts of 64 x 192 and six times for 256 x 512 (top-4, one thread, fp32).
        """
        hit = [self._products[expert] for expert in ids[0].tolist()]
        active = _swiglu(torch.cat([first(x) for first, _ in hit])).mul_(weights[0].unsqueeze(-1))  # (K, I)
        rows = active.to(x.dtype).split(1)
        out = hit[0][1](rows[0])
        for (_, second), row in zip(hit[1:], rows[1:], strict=True):
            out += second(row)
        return out

    def _several(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same for a few tokens, their choices sorted by expert."""
        order, token_of_row = sort_choices(ids, ids.numel())
        rows = x.index_select(0, token_of_row)  # (N, D)
        hit = [(self._products[expert], start, end) for expert, start, end in _runs(ids.flatten()[order].tolist())]
        active = _swiglu(torch.cat([first(rows[start:end]) for (first, _), start, end in hit]))  # (N, I)
        active = active.mul_(weights.flatten()[order].unsqueeze(-1)).to(x.dtype)
        results = torch.cat([second(active[start:end]) for (_, second), start, end in hit])
        return torch.zeros_like(x).index_add_(0, token_of_row, results)

    @staticmethod
    def _all(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Few tokens that together hit most experts anyway: every expert for every token, with weight zero for those
        not chosen. 8 tokens, 16 experts of 64 x 192, top-4: 0.17 ms for 0.39 ms expert by expert (one thread)."""
        n_experts, wide, hidden = gate_up.shape
        inner = linear(x, gate_up.view(-1, hidden)).view(-1, n_experts, wide)
        spread = weights.new_zeros(x.shape[0], n_experts).scatter_(1, ids, weights)
        active = _swiglu(inner).mul_(spread.unsqueeze(-1))  # (T, E, I)
        return torch.bmm(active.transpose(0, 1), down.transpose(1, 2)).sum(0)

    @staticmethod
    def _many(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """A prompt's tokens: the kernel of training, which keeps nothing here."""
        order, token_of_row = sort_choices(ids, ids.numel())
        counts = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).tolist()
        by_row = weights.flatten()[order]
        return experts_mlp(x, token_of_row, gate_up, down, counts, by_row, combine=True, keep_hidden=False)


def _swiglu(inner: Tensor) -> Tensor:
    """(N, 2I) -> (N, I)."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _products(experts: Experts | QuantizedExperts) -> list[tuple[Function, Function]]:
    """Both products of each expert with rows."""
    if isinstance(experts, QuantizedExperts):
        return [
            (partial(quantized_linear, matrix=first), partial(quantized_linear, matrix=second))
            for first, second in zip(experts.first, experts.second, strict=True)
        ]
    pairs = zip(experts.gate_up_proj.detach().unbind(0), experts.down_proj.detach().unbind(0), strict=True)
    return [(partial(torch.mm, mat2=first.t()), partial(torch.mm, mat2=second.t())) for first, second in pairs]


def _runs(ids: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, end) of each run of equal numbers in a sorted list."""
    found, start = [], 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[start]:
            found.append((ids[start], start, place))
            start = place
    return found
