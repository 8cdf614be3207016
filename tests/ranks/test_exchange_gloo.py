"""The exchange over real processes and Gloo: one rank's values, gradients and bytes; and no wait without an end."""

import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from model.exchange import LocalExchange
from parallel.exchange import AllToAllExchange
from parallel.ranks import process_ranks
from parallel.wire import layer_bytes
from tests.ranks.spawn import run_ranks
from tests.unit.test_parallel_exchange import EXPERTS, TOP_K, WAYS, WIDTH, experts, inputs, run, share

ROUTINGS = ("even", "one expert takes all", "an expert without tokens")
TWO = [(way, kind, tokens) for way in WAYS if "hops" not in way for kind in ROUTINGS for tokens in ([6, 6], [0, 7])]
FOUR = [
    (way, kind, tokens)
    for way in ("dedup, 2 chunks", "two hops", "two hops, 2 chunks", "two hops, budget")
    for kind in ROUTINGS
    for tokens in ([6, 6, 6, 6], [9, 0, 3, 1])
]


def on_ranks(rank: int, world_size: int, payload: dict) -> list:
    """Runs every case on this rank's share of the tokens and experts."""
    ranks = process_ranks(world_size, 60, ranks_per_node=2)
    results = []
    for way, kind, tokens_by_rank in payload["cases"]:
        exchange = AllToAllExchange(ranks.ep, nodes=ranks.nodes, inside=ranks.inside, watch=ranks.watch, **WAYS[way])
        x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))
        mine = share(tokens_by_rank, rank)
        ranks.ep.traffic.reset()
        found = run(exchange, x[mine], ids[mine], gates[mine], weights.chunk(world_size)[rank], upstream[mine])
        results.append([*(part.tolist() for part in found), ranks.ep.traffic.reset().bytes_sent])
    return results


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["2 ranks", "2 x 2 ranks"])
def test_equals_one_rank(cases: list) -> None:
    size = len(cases[0][2])
    by_rank = run_ranks(size, "tests.ranks.test_exchange_gloo:on_ranks", {"cases": cases})
    for number, (way, kind, tokens_by_rank) in enumerate(cases):
        x, ids, gates, weights, upstream = inputs(kind, sum(tokens_by_rank))
        whole = run(LocalExchange(), x, ids, gates, weights, upstream)
        for part in range(5):
            joined = [row for results in by_rank for row in results[number][part]]
            found = torch.tensor(joined).reshape(whole[part].shape)
            assert torch.allclose(found, whole[part], rtol=1e-5, atol=1e-6), (way, kind, tokens_by_rank, part)
        options = WAYS[way]
        if "rows_budget" in options:
            continue
        formula = layer_bytes(
            options["kind"], [ids[share(tokens_by_rank, rank)].tolist() for rank in range(size)], EXPERTS, WIDTH, 4,
            ranks_per_node=2, chunks=options.get("chunks", 1),
        )  # fmt: skip
        sent = [results[number][5] for results in by_rank]
        assert sent == [part.counts + part.forward + part.backward for part in formula], (way, kind, tokens_by_rank)


def late(rank: int, world_size: int, payload: dict) -> dict[str, Any]:
    """One good exchange, then one to which rank 1 does not come in time; forward or backward."""
    ranks = process_ranks(world_size, payload["timeout_s"])
    exchange = AllToAllExchange(ranks.ep, watch=ranks.watch)
    ids = torch.tensor([[0, 3, 6]] * 5)

    def step(number: int, sleeps_before: str = "") -> Tensor:
        ranks.watch.step = number
        x = torch.ones(5, WIDTH, requires_grad=True)
        weights = torch.ones(3, WIDTH, WIDTH, requires_grad=True)
        if sleeps_before == "forward" and rank == 1:
            time.sleep(payload["sleep_s"])
        out, _ = exchange.run(x, ids, torch.ones(5, TOP_K), 9, experts, (weights,), None, "layers.2.mlp")
        if sleeps_before == "backward" and rank == 1:
            time.sleep(payload["sleep_s"])
        out.sum().backward()
        return out

    step(11)
    started = time.monotonic()
    try:
        step(12, payload["phase"])
    except RuntimeError as error:
        elsewhere = RuntimeError("Connection closed by peer")  # what a rank of another group would see
        ranks.watch.explain(elsewhere)
        return {
            "error": f"{type(error).__name__}: {error}",
            "seconds": time.monotonic() - started,
            "elsewhere": elsewhere.__notes__,
        }
    return {"error": "", "seconds": 0.0, "elsewhere": []}


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_rank_that_does_not_arrive_is_named_on_every_rank(phase: str) -> None:
    payload = {"timeout_s": 2.0, "sleep_s": 5.0, "phase": phase}
    by_rank = run_ranks(3, "tests.ranks.test_exchange_gloo:late", payload, timeout_s=60, group_timeout_s=2.0)
    what, expected = {
        "forward": ("exchange of counts", "1 rows of"),
        "backward": ("gradient of combine", "5 rows of 20 bytes"),
    }[phase]
    lost = "rank 1 did not arrive within 2 s at step 12, layer layers.2.mlp"
    for rank, found in enumerate(by_rank):
        assert found["error"].startswith(f"LostRankError: {lost}"), found
        assert found["error"].count("did not arrive") == 1, "the others are not accused"
        assert re.search(f"{what}: {expected}", found["error"]), found
        assert f"; rank {rank} was at step 12, layer layers.2.mlp" in found["error"]
        assert found["elsewhere"] and found["elsewhere"][0].startswith(lost)
        assert found["seconds"] < 30.0, "every rank stops"
