"""The choices of the global batch that rule `aux_loss` weighs its loss with, known before the gradient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.stream import MicroBatch
from launch.config import Config
from launch.losses import batch_balance
from launch.train import BatchChoices
from model.config import ModelConfig
from model.probe import NonFiniteError
from model.routing_stats import RoutingStats, stack_layers
from parallel.communicator import SingleCommunicator
from parallel.config import BalanceConfig
from parallel.threads import run_virtual_ranks

EXPERTS, TOP_K = 4, 2


def micro_batch(seed: int) -> MicroBatch:
    """Two sequences of three tokens."""
    tokens = torch.randint(0, 9, (2, 3), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens, tokens, tokens, tokens > 0, torch.tensor([seed, seed + 100]))


def routing(batch: MicroBatch) -> RoutingStats:
    """A gate whose scores depend on the tokens."""
    scores = ((batch.tokens.flatten().unsqueeze(1) + 1) * torch.tensor([0.1, 0.7, 0.3, 1.1])).sin().abs()  # (T, E)
    counts = torch.zeros(scores.shape).scatter_(1, scores.topk(TOP_K).indices, 1.0).sum(0).long()
    sums = (scores / scores.sum(-1, keepdim=True)).sum(0)
    stats = stack_layers([], 1, EXPERTS, torch.device("cpu"))
    return stats._replace(tokens_per_expert=counts.unsqueeze(0), score_sums=sums.unsqueeze(0))


class Gate:
    """An engine whose model is the gate; remembers its forwards."""

    def __init__(self) -> None:
        self.with_gradient: list[bool] = []

    def forward(self, tokens: torch.Tensor, doc_ids: torch.Tensor, targets: torch.Tensor, real: Any) -> Any:
        self.with_gradient.append(torch.is_grad_enabled())
        if (tokens < 0).any():
            raise NonFiniteError("layers.0", "output", None, "all of them")
        return SimpleNamespace(routing=routing(MicroBatch(tokens, targets, doc_ids, tokens > 0, tokens)))


def session(rule: str = "aux_loss", dp: Any = None) -> Any:
    """What BatchChoices reads of a session."""
    model = ModelConfig(n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1, topk_group=1)
    config = Config(model=model, balance=BalanceConfig(rule=rule))  # type: ignore[arg-type]
    ranks = SimpleNamespace(dp=dp or SingleCommunicator())
    biases = {"layers.0.mlp.gate": torch.zeros(EXPERTS)}
    return SimpleNamespace(config=config, biases=biases, engine=Gate(), ranks=ranks, device=torch.device("cpu"))


def expected(batches: list[MicroBatch]) -> float:
    """The balance loss of all of them as one."""
    stats = [routing(batch) for batch in batches]
    counts = torch.stack([one.tokens_per_expert for one in stats]).sum(0)
    return float(batch_balance(torch.stack([one.score_sums for one in stats]).sum(0), counts, TOP_K))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_shares_add_up_to_the_loss_of_the_global_batch(world: int, accumulation: int) -> None:
    whole = [micro_batch(seed) for seed in range(world * accumulation)]

    def work(group: Any, rank: int) -> tuple[float, list[bool]]:
        mine = whole[rank * accumulation :][:accumulation]
        one = session(dp=group.communicator(list(range(world)), rank))
        choices = BatchChoices(one, 0, mine)
        shares = [choices.balance_loss(routing(batch)) for batch in mine]
        return float(sum(share for share in shares if share is not None)), one.engine.with_gradient

    found = run_virtual_ranks(world, work)
    assert sum(share for share, _ in found) == pytest.approx(expected(whole), rel=1e-6)
    for _, forwards in found:
        assert forwards == ([False] * accumulation if accumulation > 1 else []), "one micro-step needs no forward more"


def test_counts_handed_in_stay_as_they_are() -> None:
    def work(group: Any, rank: int) -> bool:
        stats = routing(micro_batch(rank))
        before = stats.tokens_per_expert.clone()
        BatchChoices(session(dp=group.communicator([0, 1], rank)), 0, [micro_batch(rank)]).balance_loss(stats)
        return torch.equal(stats.tokens_per_expert, before)

    assert run_virtual_ranks(2, work) == [True, True], "the sum over ranks must not be taken in the rank's own counts"


@pytest.mark.parametrize("rule", ["sign", "proportional", "quantile", "none"])
def test_other_rules_pay_nothing(rule: str) -> None:
    one = session(rule)
    choices = BatchChoices(one, 0, [micro_batch(0), micro_batch(1)])
    assert choices.balance_loss(routing(micro_batch(0))) is None
    assert one.engine.with_gradient == []


def test_a_number_that_is_not_finite_is_told_with_its_samples() -> None:
    bad = micro_batch(1)._replace(tokens=torch.full((2, 3), -1))
    with pytest.raises(NonFiniteError) as error:
        BatchChoices(session(), 6, [micro_batch(0), bad])
    assert error.value.__notes__ == ["in step 7, sample ids [1, 101]"]
