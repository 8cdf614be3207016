"""The exchange over several ranks equals one rank that holds all experts: values and gradients, however skewed."""

import pytest
import torch
from torch import Tensor

from model.exchange import LocalExchange
from parallel.exchange import AllToAllExchange, regroup_index
from parallel.threads import VirtualWorld, run_virtual_ranks

EXPERTS, TOP_K, WIDTH = 8, 2, 5


def routing(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """(T, K) expert choices of a kind."""
    if kind == "even":
        return torch.arange(tokens * TOP_K).view(tokens, TOP_K) % EXPERTS
    if kind == "one expert takes all":
        return torch.tensor([[5, 6]]).expand(tokens, -1).clone()
    if kind == "an expert without tokens":
        return torch.rand(tokens, EXPERTS - 1, generator=generator).topk(TOP_K).indices + 1
    return torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices


def experts(rows: Tensor, rows_per_expert: tuple[int, ...], weights: Tensor) -> Tensor:
    """A different nonlinear map for each expert: (R, D) -> (R, D)."""
    parts = rows.split(list(rows_per_expert))
    return torch.cat([torch.tanh(part @ weight) for part, weight in zip(parts, weights, strict=True)])


def run(exchange, x: Tensor, ids: Tensor, gates: Tensor, weights: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward through an exchange; returns output and the gradients of x, gates and expert weights."""
    x, gates, weights = (tensor.clone().requires_grad_() for tensor in (x, gates, weights))
    dispatched = exchange.dispatch(x, ids, gates, EXPERTS)
    out = exchange.combine(experts(dispatched.rows, dispatched.rows_per_expert, weights), dispatched)
    (out * upstream).sum().backward()
    return out.detach(), x.grad, gates.grad, weights.grad


@pytest.mark.parametrize("kind", ["even", "random", "one expert takes all", "an expert without tokens"])
@pytest.mark.parametrize("tokens_by_rank", [[6, 6], [0, 7], [9, 0, 3, 1], [4, 4, 4, 4]])
def test_equals_one_rank(kind: str, tokens_by_rank: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    total, size = sum(tokens_by_rank), len(tokens_by_rank)
    x, gates = torch.randn(total, WIDTH, generator=generator), torch.rand(total, TOP_K, generator=generator)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
    upstream = torch.randn(total, WIDTH, generator=generator)
    ids = routing(kind, total, generator)
    whole = run(LocalExchange(), x, ids, gates, weights, upstream)

    def work(world: VirtualWorld, rank: int) -> tuple[Tensor, ...]:
        first = sum(tokens_by_rank[:rank])
        mine = slice(first, first + tokens_by_rank[rank])
        exchange = AllToAllExchange(world.communicator(list(range(size)), rank))
        local = weights.chunk(size)[rank]
        return run(exchange, x[mine], ids[mine], gates[mine], local, upstream[mine])

    parts = run_virtual_ranks(size, work)
    for number in range(4):
        assert torch.allclose(torch.cat([part[number] for part in parts]), whole[number], rtol=1e-5, atol=1e-6)


def test_a_wrong_split_is_noticed_and_frees_the_other_ranks() -> None:
    def work(world: VirtualWorld, rank: int) -> None:
        communicator = world.communicator([0, 1], rank)
        communicator.all_to_all(torch.zeros(2, 1), [1, 1], [1, 1] if rank == 0 else [2, 1])

    with pytest.raises(RuntimeError, match="sends 1 rows to rank 1, which expects 2"):
        run_virtual_ranks(2, work)


def test_regroup_index_against_a_loop() -> None:
    came = torch.tensor([[2, 0, 1], [0, 3, 1]])  # from 2 ranks, for 3 local experts
    labels = [(source, expert) for source in range(2) for expert in range(3) for _ in range(came[source, expert])]
    regrouped = [labels[i] for i in regroup_index(came).tolist()]
    assert regrouped == sorted(labels, key=lambda label: (label[1], label[0]))


def test_bytes_sent_elsewhere_are_counted() -> None:
    def work(world: VirtualWorld, rank: int) -> int:
        communicator = world.communicator([0, 1], rank)
        communicator.all_to_all(torch.zeros(3, 4), [1, 2] if rank == 0 else [2, 1], [1, 2] if rank == 0 else [2, 1])
        return communicator.traffic.reset().bytes_sent

    assert run_virtual_ranks(2, work) == [2 * 4 * 4, 2 * 4 * 4]
