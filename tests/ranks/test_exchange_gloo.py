"""The exchange over real processes and Gloo: values and gradients are those of one rank, even without a token."""

import pytest
import torch

from model.exchange import LocalExchange
from parallel.exchange import AllToAllExchange
from parallel.ranks import process_ranks
from tests.ranks.spawn import run_ranks
from tests.unit.test_parallel_exchange import EXPERTS, TOP_K, WIDTH, routing, run

CASES = [
    (kind, tokens)
    for kind in ("even", "random", "one expert takes all", "an expert without tokens")
    for tokens in ([6, 6], [0, 7])
]


def inputs(kind: str, total: int) -> tuple[torch.Tensor, ...]:
    """The same tensors in every process."""
    generator = torch.Generator().manual_seed(3)
    x, gates = torch.randn(total, WIDTH, generator=generator), torch.rand(total, TOP_K, generator=generator)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
    upstream = torch.randn(total, WIDTH, generator=generator)
    return x, routing(kind, total, generator), gates, weights, upstream


def on_ranks(rank: int, world_size: int, payload: dict) -> list:
    """Runs every case on this rank's share of the tokens and experts."""
    exchange = AllToAllExchange(process_ranks(world_size, 60).ep)
    results = []
    for kind, tokens_by_rank in payload["cases"]:
        x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))
        first = sum(tokens_by_rank[:rank])
        mine = slice(first, first + tokens_by_rank[rank])
        found = run(exchange, x[mine], ids[mine], gates[mine], weights.chunk(world_size)[rank], upstream[mine])
        results.append([part.tolist() for part in found])
    return results


def test_equals_one_rank() -> None:
    by_rank = run_ranks(2, "tests.ranks.test_exchange_gloo:on_ranks", {"cases": CASES})
    for number, (kind, tokens_by_rank) in enumerate(CASES):
        x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))
        whole = run(LocalExchange(), x, ids, gates, weights, upstream)
        for part in range(4):
            joined = [row for results in by_rank for row in results[number][part]]
            assert torch.tensor(joined).reshape(whole[part].shape).numpy() == pytest.approx(
                whole[part].numpy(), rel=1e-5, abs=1e-6
            ), (kind, tokens_by_rank, part)
