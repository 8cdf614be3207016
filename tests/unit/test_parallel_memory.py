"""What a layer keeps for its backward is what the formula says, and a budget holds however skewed the routing is."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.exchange import Exchange, LocalExchange
from model.moe import Experts
from parallel.exchange import AllToAllExchange
from parallel.memory import bounded_bytes, one_rank_bytes, several_ranks_bytes
from parallel.ranks import virtual_ranks
from parallel.threads import VirtualWorld, run_virtual_ranks
from parallel.wire import rows_between

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K, RANKS = 256, 64, 48, 8, 3, 4


def layer(first: int, n_local: int) -> Experts:
    """Experts first .. first + n_local - 1 of a layer that is the same for every layout."""
    module = Experts(n_local, HIDDEN, WIDTH)
    for parameter in module.parameters():
        generator = torch.Generator().manual_seed(7)
        whole = 0.1 * torch.randn(EXPERTS, *parameter.shape[1:], generator=generator)
        parameter.data.copy_(whole[first : first + n_local])
    return module


def tokens(rank: int, skewed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D), ids (T, K), weights (T, K) of a rank; skewed: all tokens on the experts of rank 0 and one of rank 1."""
    generator = torch.Generator().manual_seed(rank)
    x, weights = torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, TOP_K, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    return x.requires_grad_(), (torch.tensor([[0, 1, 2]]).expand(TOKENS, -1) if skewed else ids), weights


class Kept:
    """Storages that autograd saved, and those of tensors that came to be, since its start."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.saved: dict[int, int] = {}
        self.before = {id(one) for one in gc.get_objects() if isinstance(one, Tensor)}

    def hook(self) -> Any:
        """Notes what autograd saves while it is entered."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def nbytes(self, *result: Tensor) -> int:
        """Bytes kept now, without the results."""
        gc.collect()
        for one in gc.get_objects():
            if isinstance(one, Tensor) and id(one) not in self.before:
                self._note(one)
        for tensor in result:
            self.known.add(tensor.untyped_storage().data_ptr())
        return sum(size for place, size in self.saved.items() if place not in self.known)


def test_one_rank_keeps_what_the_formula_says() -> None:
    module = layer(0, EXPERTS)
    x, ids, weights = tokens(0, skewed=False)
    kept = Kept(weights, ids, *module.parameters())
    with kept.hook():
        out, _ = module(x, ids, weights, EXPERTS, LocalExchange(), None, "")
    formula = one_rank_bytes(TOKENS, TOP_K, HIDDEN, WIDTH, 4)
    assert kept.nbytes(out) == pytest.approx(formula, rel=0.03)
    assert formula < 0.85 * TOKENS * TOP_K * (HIDDEN + 2 * WIDTH) * 4, "less than rows and products of each choice"


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("way", [{"kind": "dedup"}, {"kind": "dedup", "chunks": 2}, {"kind": "two_hop"}])
def test_several_ranks_keep_what_the_formula_says(way: dict[str, Any], skewed: bool) -> None:
    """Threads of one process, so the sum over ranks is measured."""
    modules = [layer(2 * rank, 2) for rank in range(RANKS)]
    inputs = [tokens(rank, skewed) for rank in range(RANKS)]
    kept = Kept(*(t for x, _, w in inputs for t in (x, w)), *(p for module in modules for p in module.parameters()))
    gate, outs, measured = threading.Barrier(RANKS), [torch.empty(0)] * RANKS, []

    def work(world: VirtualWorld, rank: int) -> None:
        ranks = virtual_ranks(world, RANKS, rank, ranks_per_node=2)
        exchange = AllToAllExchange(ranks.ep, nodes=ranks.nodes, inside=ranks.inside, **way)
        with kept.hook():
            outs[rank], _ = modules[rank](*inputs[rank], EXPERTS, exchange, None, "")
        gate.wait()
        if rank == 0:
            measured.append(kept.nbytes(*outs))
        gate.wait()

    run_virtual_ranks(RANKS, work)
    matrix = rows_between([ids.tolist() for _, ids, _ in inputs], 2, RANKS)
    formula = 0
    for rank in range(RANKS):
        came = sum(row[rank] for row in matrix)
        choices = sum(int((ids // 2 == rank).sum()) for _, ids, _ in inputs)
        records = [sum(matrix[rank])]
        if way["kind"] == "two_hop":
            nodes = rows_between([inputs[rank][1].tolist()], 4, 2)[0]
            passed = sum(matrix[source][goal] for source in (rank % 2, rank % 2 + 2)
                         for goal in (rank // 2 * 2, rank // 2 * 2 + 1))  # fmt: skip
            records = [sum(nodes), passed]
        formula += several_ranks_bytes(
            TOKENS, TOP_K, records, came, choices, HIDDEN, WIDTH, 4, chunks=way.get("chunks", 1)
        )
    assert measured[0] == pytest.approx(formula, rel=0.03)


class Peak(TorchDispatchMode):
    """The most bytes alive at once among those that this thread's operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.seen:
                    self.seen.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, name: int, nbytes: int) -> None:
        self.seen.discard(name)
        self.now -= nbytes


def run_steps(skewed: bool, **options: Any) -> tuple[list[float], int, int]:
    """Three steps of plain descent; returns losses, rank 0's peak of memory in bytes, and what it keeps between."""
    ids_of = [tokens(rank, skewed)[1] for rank in range(RANKS)]
    if skewed:  # every token to one expert
        ids_of = [torch.zeros(TOKENS, 1, dtype=torch.int64)] * RANKS
    top_k = ids_of[0].shape[1]

    def work(world: VirtualWorld, rank: int) -> tuple[list[float], int]:
        ranks = virtual_ranks(world, RANKS, rank)
        exchange: Exchange = AllToAllExchange(ranks.ep, **options)
        module = layer(2 * rank, 2)
        x, _, weights = tokens(rank, skewed)
        weights = weights[:, :top_k].contiguous()
        tracker, losses = Peak(), []
        with tracker:
            for _ in range(3):
                out, _ = module(x, ids_of[rank], weights, EXPERTS, exchange, None, "")
                loss = (out - 1).square().sum()
                losses.append(float(ranks.ep.all_reduce(loss.detach().clone())))
                loss.backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 1e-5 * parameter.grad
                        parameter.grad = None
        return losses, tracker.most

    found = run_virtual_ranks(RANKS, work)
    return found[0][0], found[0][1], bounded_bytes(TOKENS, top_k, HIDDEN, 4)


def test_all_tokens_on_one_expert_stay_inside_the_budget_with_the_same_loss() -> None:
    """The rank of that expert gets four times an even rank's rows. With a budget of an even rank's rows it needs no
    more memory than an even rank does."""
    _, even_peak, _ = run_steps(False)
    losses, peak, _ = run_steps(True)
    bounded_losses, bounded_peak, kept = run_steps(True, rows_budget=TOKENS)
    assert bounded_losses == pytest.approx(losses, rel=1e-5)
    assert losses[2] < losses[0]
    assert bounded_peak < even_peak
    assert bounded_peak < 0.6 * peak
    assert bounded_peak > kept
