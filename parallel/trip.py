"""One call of the exchange: its chunks on their way, and the two autograd functions that start and end it.

A chunk's way is a generator that stops wherever a transfer is under way; all chunks are taken one stage further in
turn, so while one chunk's rows travel another's are computed. The backward has the same form:

    forward    Depart: chunks set out | whatever is made in between | Arrive: experts, results home, sums
    backward   Arrive: gradients of results set out | the same | Depart: experts, gradients home, sums
"""

# T tokens, D hidden, M input rows of a hop, K slots of a row, R rows that came, N choices of local experts

from collections.abc import Generator, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from model.exchange import ExpertFunction, sort_choices
from parallel.counts import ChunkPlan
from parallel.hop import Hop, Leg
from parallel.records import Form
from parallel.watch import Watch

Steps = Generator[None, None, None]  # stops at each point where a transfer is under way
_Rows = Generator[None, None, tuple[Tensor, ...]]


class Way:
    """One chunk between its forward and its backward."""

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan = plan
        self.legs: list[Leg] = []
        self.order: Tensor | None = None  # (N,)
        self.result: GradientEdge | None = None
        self.inputs: list[GradientEdge] = []  # rows, sorted weights, parameters


class Trip:
    """What the two autograd functions share. All ranks start transfers in the same order.

    Args:
        plans: of the chunks. bounded: one chunk at a time, and nothing but the tokens kept for the backward.
        ids: (T, K) experts of the tokens. each_choice: a record for each, not for each rank.
        block: number of the first local expert, and how many there are.
        written: form of tokens, and of everything else.
        layer: name, for errors.
    """

    def __init__(
        self,
        plans: list[ChunkPlan],
        bounded: bool,
        hops: list[Hop],
        experts: ExpertFunction,
        ids: Tensor,
        each_choice: bool,
        block: tuple[int, int],
        written: tuple[Form, Form],
        watch: Watch,
        layer: str,
    ) -> None:
        self.ways = [Way(chunk) for chunk in plans]
        self.bounded = bounded
        self.hops, self.experts, self.ids = hops, experts, ids
        self.fan = ids.shape[1] if each_choice else 1
        self.first_expert, self.n_local = block
        self.written = written
        self.watch, self.layer = watch, layer
        self.keeps_graph = False
        self.parameters: tuple[Tensor, ...] = ()
        self.results: list[tuple[Tensor, ...]] = []
        self.steps: list[Steps] = []
        self.grad: Tensor | None = None

    # -- forward ----------------------------------------------------------------------------------------------------

    def depart(self, x: Tensor, weights: Tensor, parameters: tuple[Tensor, ...]) -> None:
        """Starts the first transfers."""
        self.parameters = parameters
        self.results = [()] * len(self.ways)
        self.steps = [self._forward(number, x, weights) for number in range(len(self.ways))]
        if not self.bounded:
            _drive(self.steps, stages=1)

    def arrive(self) -> Tensor:
        """Computes what comes and returns the sums (T, D)."""
        self._finish()
        out = _joined([result[0] for result in self.results])
        self.parameters, self.results = (), []
        return out

    def _finish(self) -> None:
        if self.bounded:
            for step in self.steps:
                _drive([step])
        else:
            _drive(self.steps)
        self.steps = []

    def _forward(self, number: int, x: Tensor, weights: Tensor) -> Steps:
        way = self.ways[number]
        keep = self.keeps_graph and not self.bounded
        rows, sorted_weights = yield from self._bring(way, x, weights)
        out = self._compute(way, rows, sorted_weights, self.parameters, keep)
        del rows, sorted_weights
        (summed,) = yield from self._home(way, out)
        self.results[number] = (summed,)
        if not keep:
            way.legs = []

    def _bring(self, way: Way, x: Tensor, weights: Tensor) -> _Rows:
        """Tokens through every hop: rows (R, D) and the sorted weights (N,) of the local experts' choices."""
        plan = way.plan
        x, ids, weights = (tensor[plan.start : plan.stop] for tensor in (x, self.ids, weights))
        fan, way.legs = self.fan, []
        for hop, splits in zip(self.hops, plan.hops, strict=True):
            if fan > 1:
                ids, weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
            leg = Leg(hop, ids, fan, splits, *self.written)
            coming = leg.send(x, ids, weights)
            yield
            x, ids, weights = coming.wait()
            way.legs.append(leg)
            fan = 1
        local = ids - self.first_expert
        local = torch.where((local >= 0) & (local < self.n_local), local, self.n_local)
        way.order, _ = sort_choices(local, sum(plan.rows_per_expert))
        return x, weights.reshape(-1).index_select(0, way.order)

    def _compute(self, way: Way, rows: Tensor, weights: Tensor, parameters: tuple[Tensor, ...], keep: bool) -> Tensor:
        """The experts' results (R, D); where `keep`, with a graph of their own back to rows and parameters."""
        assert way.order is not None
        token_of_row = torch.div(way.order, way.legs[-1].n_slots, rounding_mode="floor")
        if keep:
            rows, weights = rows.detach().requires_grad_(), weights.detach().requires_grad_()
        with torch.enable_grad() if keep else nullcontext():
            out = self.experts(rows, token_of_row, way.plan.rows_per_expert, weights, *parameters)
        if keep:
            way.result = get_gradient_edge(out)
            wanted = (rows, weights, *(parameter for parameter in parameters if parameter.requires_grad))
            way.inputs = [get_gradient_edge(tensor) for tensor in wanted]
        return out.detach()

    def _home(self, way: Way, rows: Tensor, slots: Tensor | None = None) -> _Rows:
        """Results, or gradients, back through every hop: (T, D), and (M, K) where there are slots."""
        for leg in reversed(way.legs):
            coming = leg.send_home(rows, slots)
            yield
            rows, *rest = coming.wait()
            rows = leg.add_up(rows)
            slots = leg.add_up_slots(rest[0]) if rest else None
        return (rows,) if slots is None else (rows, slots)

    # -- backward ---------------------------------------------------------------------------------------------------

    def depart_gradient(self, grad: Tensor) -> None:
        """Starts the first transfers of gradients of results (T, D)."""
        self.watch.layer = self.layer
        if self.bounded:
            self.grad = grad
            return
        self.results = [()] * len(self.ways)
        self.steps = [self._backward(number, grad) for number in range(len(self.ways))]
        _drive(self.steps, stages=1)

    def arrive_gradient(
        self, x: Tensor | None, weights: Tensor | None, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x (T, D), of weights (T, K) and of each parameter that wants one.

        Args:
            x, weights: what was sent, for a bounded trip.
            parameters: all of them.
        """
        self.watch.layer = self.layer
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * sum(parameter.requires_grad for parameter in parameters)
        if self.bounded:
            assert self.grad is not None and x is not None and weights is not None
            self.results = [()] * len(self.ways)
            self.steps = [self._again(number, self.grad, x, weights) for number in range(len(self.ways))]
        self._finish()
        grad_x = _joined([result[0] for result in self.results])
        grad_weights = _joined([result[1] for result in self.results]).view(self.ids.shape)
        sums = iter(self.sums)
        grads = tuple(next(sums) if parameter.requires_grad else None for parameter in parameters)
        self.parameters, self.results, self.ways, self.grad, self.sums = (), [], [], None, []
        return grad_x, grad_weights, *grads

    def _again(self, number: int, grad: Tensor, x: Tensor, weights: Tensor) -> Steps:
        """A chunk of a bounded trip: its forward once more, then its backward."""
        way = self.ways[number]
        rows, sorted_weights = yield from self._bring(way, x, weights)
        self._compute(way, rows, sorted_weights, self.parameters, keep=True)
        del rows, sorted_weights
        yield from self._backward(number, grad)
        way.legs = []

    def _backward(self, number: int, grad: Tensor) -> Steps:
        way = self.ways[number]
        grad = grad[way.plan.start : way.plan.stop]
        for leg in way.legs:
            coming = leg.send_gradient(grad)
            yield
            (grad,) = coming.wait()
        assert way.result is not None and way.order is not None
        n_rows, n_slots = grad.shape[0], way.legs[-1].n_slots
        grad_rows, grad_sorted, *grads = torch.autograd.grad([way.result], way.inputs, [grad], allow_unused=True)
        way.result, way.inputs = None, []
        for place, one in enumerate(grads):
            total = self.sums[place]
            self.sums[place] = one if total is None else total.add_(one) if one is not None else total
        del grads
        slots = grad_sorted.new_zeros(n_rows * n_slots).index_copy_(0, way.order, grad_sorted)
        way.order = None
        self.results[number] = yield from self._home(way, grad_rows, slots.view(n_rows, n_slots))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _drive(steps: Iterable[Steps], stages: int = 0) -> None:
    """Takes every generator one stage further in turn, `stages` times or (0) until all have ended."""
    going = list(steps)
    done = 0
    while going and not (stages and done == stages):
        going = [step for step in going if next(step, _ENDED) is not _ENDED]
        done += 1


_ENDED = object()


class Depart(torch.autograd.Function):
    """Start of a trip forward, end of it backward; its result is a mark that ties the two functions together."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        ctx.trip = trip
        # The parameters themselves, not views of them: a sharding engine may free and refill their storage.
        ctx.save_for_backward(*((x, weights) if trip.bounded else (None, None)), *parameters)
        trip.depart(x, weights, parameters)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *parameters = ctx.saved_tensors
        return None, *ctx.trip.arrive_gradient(x, weights, tuple(parameters))


class Arrive(torch.autograd.Function):
    """End of a trip forward, start of it backward. What is made between the two functions runs between them in the
    backward too: autograd takes the node made last first."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, mark: Tensor) -> Tensor:
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.depart_gradient(grads[0].contiguous())
        return None, grads[0].new_zeros(())
