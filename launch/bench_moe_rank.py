"""One process of `trimtab bench moe`: one kind of layer on tokens of natural and of even routing, timed and checked."""

# T tokens of a rank, D hidden, E experts, K top-k

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launch.bench_moe_layers import SCALE, WAYS, Layer, LayerShape, draw_weights
from launch.bench_ranks import PeakMemory

ROUTINGS = ("natural", "even")
_WARM_UP = 2


def draw_tokens(shape: LayerShape, gate: Tensor, rank: int, routing: str) -> Tensor:
    """(B, S, D) tokens for which every kind of router chooses the same, with that gate (E, D).

    Random tokens, moved inside the space of the gate's rows until their logits are those that are wanted: `natural` are
    random ones with experts that are liked more and less, `even` make each expert's load the same.
    """
    generator = torch.Generator().manual_seed(1000 + rank)
    n_tokens = shape.batch * shape.seq_len
    noise = torch.randn(n_tokens, shape.experts, generator=generator)
    if routing == "even":
        first = torch.arange(n_tokens)[:, None]
        chosen = (first + max(1, shape.experts // shape.top_k) * torch.arange(shape.top_k)) % shape.experts
        wanted = (0.1 * noise).scatter_add(1, chosen, torch.full(chosen.shape, 3.0))
    else:
        liked = torch.randn(shape.experts, generator=torch.Generator().manual_seed(99))
        wanted = liked + noise
    plain = torch.randn(n_tokens, shape.hidden, generator=generator).double()
    rows = gate.double()
    moved = plain + (wanted.double() - plain @ rows.T) @ torch.linalg.inv(rows @ rows.T) @ rows
    return moved.float().view(shape.batch, shape.seq_len, shape.hidden)


def plain_layer(shape: LayerShape, weights: dict[str, Tensor], x: Tensor, softmax: bool) -> Tensor:
    """The layer computed without any dispatch: every expert on every token, in float64."""
    w = {name: value.double() for name, value in weights.items()}
    tokens = x.double().reshape(-1, shape.hidden)
    logits = tokens @ w["gate"].T
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    top, ids = scores.topk(shape.top_k, -1)
    share = torch.zeros_like(scores).scatter(1, ids, top / top.sum(-1, keepdim=True) * SCALE)  # (T, E)

    def swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(tokens @ gate.T) * (tokens @ up.T)) @ down.T

    out = swiglu(w["shared_gate"], w["shared_up"], w["shared_down"])
    for expert in range(shape.experts):
        gate, up = w["gate_up"][expert].chunk(2)
        out = out + share[:, expert, None] * swiglu(gate, up, w["down"][expert])
    return out.view_as(x)


def loads(shape: LayerShape, gate: Tensor, x: Tensor) -> Tensor:
    """(E,) int64: this rank's tokens of each expert."""
    ids = (x.reshape(-1, shape.hidden) @ gate.T).topk(shape.top_k, -1).indices
    return torch.bincount(ids.flatten(), minlength=shape.experts)


def measure(job: dict[str, Any], rank: int, n_ranks: int) -> list[dict[str, Any]]:
    """Times forward and backward of job["way"]; job: way, shape, inner (timed runs a routing)."""
    shape = LayerShape(**job["shape"])
    weights = draw_weights(shape)
    busiest = {"now": 0}
    layer = WAYS[job["way"]].build(shape, weights, rank, n_ranks, busiest)
    found = []
    for routing in ROUTINGS:
        x = draw_tokens(shape, weights["gate"], rank, routing)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2000 + rank))
        counts = loads(shape, weights["gate"], x)
        most = counts.max()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(counts)
        busiest["now"] = int(most)
        errors = _errors(layer, shape, weights, x, upstream)
        forward, backward, exposed = [], [], []
        for number in range(_WARM_UP + job["inner"]):
            for parameter in layer.parameters:
                parameter.grad = None
            leaf = x.clone().requires_grad_()
            dist.barrier()
            if layer.exposed:
                layer.exposed()
            started = time.perf_counter()
            out = layer.run(leaf)
            between = time.perf_counter()
            out.backward(upstream)
            ended = time.perf_counter()
            if number >= _WARM_UP:
                forward.append(between - started)
                backward.append(ended - between)
                exposed.append(layer.exposed() if layer.exposed else 0.0)
        found.append({
            "routing": routing, "forward": _slowest(forward), "backward": _slowest(backward),
            "seconds": _slowest([f + b for f, b in zip(forward, backward, strict=True)]),
            "exposed": _slowest(exposed) if layer.exposed else None,
            "busiest_over_mean": float(counts.max() / counts.double().mean()), **errors,
        })  # fmt: skip
    return found


def _slowest(seconds: list[float]) -> float:
    """The median over runs of the slowest rank's time."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most.median())


def _errors(
    layer: Layer, shape: LayerShape, weights: dict[str, Tensor], x: Tensor, upstream: Tensor
) -> dict[str, float | None]:
    """One run: its memory, gradients of the weights included, and the greatest difference from the plain layer,
    relative to that layer's greatest value, of the output and of the input's gradient."""
    layer.run(x.clone().requires_grad_()).backward(upstream)  # reads programs from disk, which is memory too
    for parameter in layer.parameters:
        parameter.grad = None
    leaf = x.clone().requires_grad_()
    memory = PeakMemory()
    out = layer.run(leaf)
    out.backward(upstream)
    peak = memory.mib()
    exact = x.double().requires_grad_()
    wanted = plain_layer(shape, weights, exact, layer.softmax)
    wanted.backward(upstream.double())
    assert leaf.grad is not None and exact.grad is not None
    return {
        "peak_mib": peak,
        "output_error": float((out.detach() - wanted).abs().max() / wanted.abs().max()),
        "gradient_error": float((leaf.grad - exact.grad).abs().max() / exact.grad.abs().max()),
    }
