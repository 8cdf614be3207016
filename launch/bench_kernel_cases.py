"""What `trimtab bench kernels` runs: each operation's inputs, peers, FLOPs and bytes, from shapes."""

# T tokens, D hidden, I expert width, E experts, K top-k, R = T*K rows, V vocabulary

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton
from kernels.cross_entropy import linear_cross_entropy
from kernels.experts import experts_mlp
from kernels.fp8 import quantize_rows
from kernels.grouped_mm import grouped_linear, grouped_mm
from kernels.permute import Permutation, permute, sort_by_expert, unpermute
from kernels.products import onednn_is_better, products_through
from kernels.rms_norm import rms_norm
from kernels.rope import rotate
from kernels.router_topk import RouterRule, router_topk
from kernels.swiglu import swiglu


@dataclass(frozen=True)
class Sizes:
    """The shapes of one run. `vocab_tokens` and `vocab_hidden`: of the cross-entropy, whose logits are large."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    vocab: int
    vocab_tokens: int
    vocab_hidden: int


GPU = Sizes(32768, 2048, 768, 128, 8, 129_280, 8192, 2048)
CPU = Sizes(1024, 256, 128, 16, 4, 129_280, 512, 256)
OPERATIONS = (
    "experts_mlp", "grouped_linear", "permute", "unpermute", "rms_norm", "rotate", "swiglu", "router_topk",
    "quantize_rows", "product", "linear_cross_entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs. FLOPs and bytes are of the forward and of both passes; bytes count each input
    and result once."""

    op: str
    shape: str
    routing: str  # "natural", "even", or empty where there is none
    inputs: Sequence[Tensor]
    peers: dict[str, Callable[..., Tensor]]
    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)
    backward: bool = True


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """All operations; natural and forced-even routing side by side where routing matters."""
    torch.manual_seed(seed)
    for routing in ("natural", "even"):
        yield from _routed(sizes, device, dtype, routing)
    yield from _plain(sizes, device, dtype)


def route(sizes: Sizes, routing: str) -> Tensor:
    """(T, K) experts of each token. `natural` draws them with popularities spread like those of a router that nothing
    balances (log-normal, the fullest with several times the mean); `even` gives each expert the same number."""
    if routing == "even":
        return torch.arange(sizes.tokens * sizes.top_k).view(sizes.tokens, -1) % sizes.experts
    popularity = torch.randn(sizes.experts) * 0.7
    noise = -torch.rand(sizes.tokens, sizes.experts).clamp_(1e-9).log_().neg_().log_()  # Gumbel
    return (popularity + noise).topk(sizes.top_k).indices


def _routed(sizes: Sizes, device: torch.device, dtype: torch.dtype, routing: str) -> Iterator[Case]:
    tokens, hidden, width, experts, top_k = sizes.tokens, sizes.hidden, sizes.width, sizes.experts, sizes.top_k
    n_rows, item = tokens * top_k, dtype.itemsize
    ids = route(sizes, routing)
    counts = tuple(torch.bincount(ids.flatten(), minlength=experts).tolist())
    moved = Permutation(*(index.to(device) for index in sort_by_expert(ids)))
    token_of_row = torch.div(moved.order, top_k, rounding_mode="floor")
    on_device = ids.to(device, torch.int32)
    weights = torch.rand(tokens, top_k, device=device)
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    gate_up = torch.randn(experts, 2 * width, hidden, device=device, dtype=dtype) / hidden**0.5
    down = torch.randn(experts, hidden, width, device=device, dtype=dtype) / width**0.5
    rows = x.index_select(0, token_of_row)
    shape = f"T{tokens} H{hidden} I{width} E{experts} K{top_k}"
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)

    def whole(backend: Any) -> Callable[..., Tensor]:
        def run(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
            by_row = weights.reshape(-1).index_select(0, moved.order)
            return experts_mlp(x, token_of_row, gate_up, down, counts, by_row, combine=True, backend=backend)

        return run

    def composite(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        rows = x.index_select(0, token_of_row)
        gate, up = grouped_mm()(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm()(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        return (out[moved.inverse].view(tokens, top_k, hidden) * weights.unsqueeze(-1).to(out.dtype)).sum(1)

    forward = 6.0 * n_rows * hidden * width
    yield Case(
        "experts_mlp", shape, routing, (x, gate_up, down, weights),
        _peers(whole, device) | {"torch grouped_mm": composite}
        | _liger(
            "ops.fused_moe", "LigerFusedMoEFunction", device,
            lambda f: lambda x, gate_up, down, weights: f.apply(x, gate_up, down, on_device, weights),
        ),
        (forward, 3 * forward),
    )  # fmt: skip

    def product(backend: Any) -> Callable[..., Tensor]:
        return lambda rows, weight: grouped_linear(rows, weight, counts, backend)

    yield Case(
        "grouped_linear", f"R{n_rows} D{hidden} N{2 * width} E{experts}", routing, (rows, gate_up),
        _peers(product, device) | {"torch grouped_mm": lambda x, w: grouped_mm()(x, w.transpose(1, 2), offs=ends)},
        (4.0 * n_rows * hidden * width, 12.0 * n_rows * hidden * width),
    )  # fmt: skip
    moving = float((1 + top_k) * tokens * hidden * item)
    yield Case(
        "permute", f"T{tokens} H{hidden} K{top_k}", routing, (x,),
        _peers(lambda backend: lambda x: permute(x, moved, top_k, backend), device)
        | {"torch index": lambda x: x[token_of_row]},
        bytes=(moving, 2 * moving),
    )  # fmt: skip
    yield Case(
        "unpermute", f"T{tokens} H{hidden} K{top_k}", routing, (rows, weights),
        _peers(lambda backend: lambda rows, weights: unpermute(rows, weights, moved, backend), device)
        | {
            "torch index": lambda rows, weights: (
                rows[moved.inverse].view(tokens, top_k, hidden) * weights.unsqueeze(-1).to(rows.dtype)
            ).sum(1)
        },
        # the backward reads rows and the gradient and writes the rows' gradient
        bytes=(moving, moving + float((1 + 2 * top_k) * tokens * hidden * item)),
    )  # fmt: skip


def _plain(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    tokens, hidden, item = sizes.tokens, sizes.hidden, dtype.itemsize
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    one = float(tokens * hidden * item)
    gain = torch.rand(hidden, device=device, dtype=dtype) + 0.5
    yield Case(
        "rms_norm", f"T{tokens} H{hidden}", "", (x, gain),
        _peers(lambda backend: lambda x, w: rms_norm(x, w, 1e-6, backend), device)
        | {"torch rms_norm": lambda x, w: F.rms_norm(x, (hidden,), w, 1e-6)}
        | _liger("ops.rms_norm", "LigerRMSNormFunction", device, lambda f: lambda x, w: f.apply(x, w, 1e-6)),
        bytes=(2 * one, 5 * one),
    )  # fmt: skip
    angles = torch.rand(tokens, 1, 32, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    heads = torch.randn(tokens, 16, 64, device=device, dtype=dtype)
    turned = float(2 * heads.numel() * item)
    yield Case(
        "rotate", f"T{tokens} heads 16 x 64", "", (heads,),
        _peers(lambda backend: lambda x: rotate(x, cos, sin, backend), device)
        | {"torch complex": lambda x: _complex_rotation(x, torch.polar(torch.ones_like(angles), angles))},
        bytes=(turned, 2 * turned),
    )  # fmt: skip
    both = torch.randn(tokens * sizes.top_k, 2 * sizes.width, device=device, dtype=dtype)
    part = float(both.numel() // 2 * item)
    yield Case(
        "swiglu", f"R{both.shape[0]} I{sizes.width}", "", (both,),
        _peers(lambda backend: lambda x: swiglu(x, backend), device)
        | {"torch silu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]}
        | _liger("ops.swiglu", "LigerSiLUMulFunction", device, lambda f: lambda x: f.apply(*x.chunk(2, -1))),
        bytes=(3 * part, 8 * part),
    )  # fmt: skip
    experts = sizes.experts
    rule = RouterRule(sizes.top_k, "sigmoid", 4, 2, 2, True, 2.5)
    logits, bias = torch.randn(tokens, experts, device=device), torch.randn(experts, device=device) * 0.1
    yield Case(
        "router_topk", f"T{tokens} E{experts} K{sizes.top_k} groups 4 of which 2", "", (logits,),
        _peers(lambda backend: lambda x: router_topk(x, bias, rule, 1, backend).topk_weights, device),
        bytes=(8.0 * tokens * experts, 16.0 * tokens * experts),
    )  # fmt: skip
    yield Case(
        "quantize_rows", f"T{tokens} H{hidden}", "", (x,),
        _peers(lambda backend: lambda x: quantize_rows(x, backend)[1], device),
        bytes=(one + tokens * hidden, 0.0), backward=False,
    )  # fmt: skip
    matrix = torch.randn(hidden, hidden, device=device, dtype=dtype)
    yield Case(
        "product", f"T{tokens} H{hidden} N{hidden}", "", (x, matrix),
        {"trimtab in training": _product(onednn_is_better()), "torch": _product(False)},
        (2.0 * tokens * hidden * hidden, 0.0), backward=False,
    )  # fmt: skip
    tokens, hidden, vocab = sizes.vocab_tokens, sizes.vocab_hidden, sizes.vocab
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    head = torch.randn(vocab, hidden, device=device, dtype=dtype) / hidden**0.5
    targets = torch.randint(0, vocab, (tokens,), device=device)
    products = 2.0 * tokens * hidden * vocab
    yield Case(
        "linear_cross_entropy", f"T{tokens} H{hidden} V{vocab}", "", (x, head),
        _peers(lambda backend: lambda x, w: linear_cross_entropy(x, w, targets, 0, backend), device)
        | {"trimtab in the model": lambda x, w: linear_cross_entropy(x, w, targets)}  # keeps some logits
        | {"torch whole logits": lambda x, w: F.cross_entropy((x @ w.t()).float(), targets, reduction="none")}
        | _liger(
            "transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss", device,
            lambda loss: lambda x, w: loss()(w, x, targets),
        ),
        # of the three products that both need; ours computes one of them again
        (products, 3 * products),
    )  # fmt: skip


def _product(onednn: bool) -> Callable[..., Tensor]:
    def run(x: Tensor, matrix: Tensor) -> Tensor:
        with products_through(onednn):
            return x @ matrix

    return run


def _peers(make: Callable[[Any], Callable[..., Tensor]], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The reference; on a GPU also Triton."""
    names = ["reference"] + (["triton"] if device.type == "cuda" and has_triton() else [])
    return {f"trimtab {name}": make(name) for name in names}


def _liger(
    module: str, name: str, device: torch.device, wrap: Callable[[Any], Callable[..., Tensor]]
) -> dict[str, Callable[..., Tensor]]:
    """Liger's function where it is installed and can run."""
    if device.type != "cuda":
        return {}
    try:
        found = getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except (ImportError, AttributeError):
        return {}
    return {"liger": wrap(found)}


def _complex_rotation(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
