"""Scores of continuations: equal to the plain computation, whatever company a pair is in."""

import pytest
import torch

from launch.scoring import Pair, score
from model.config import ModelConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.transformer import Transformer

VOCAB, WINDOW = 40, 8


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_nextn_predict_layers=1, num_attention_heads=2,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1,
        initializer_range=0.5,
    )  # fmt: skip
    made = Transformer(config, LocalExchange())
    init_weights(made, seed=1)
    return made.eval()


def pairs() -> list[Pair]:
    draw = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=draw).tolist()

    return [Pair(tokens(a), tokens(b)) for a, b in ((1, 1), (3, 4), (7, 2), (12, 3), (2, 8), (1, 8))]


@torch.no_grad()
def plainly(model: Transformer, pair: Pair) -> tuple[float, bool]:
    """Token by token, each from its own last WINDOW tokens that a single cut of the whole pair leaves it."""
    whole = [*pair.context, *pair.continuation]
    start = max(0, len(whole) - 1 - WINDOW)
    total, greedy = 0.0, True
    for at in range(len(pair.context), len(whole)):
        logits = model(torch.tensor([whole[start:at]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[whole[at]])
        greedy &= int(logits.argmax()) == whole[at]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_one_token_at_a_time(model: Transformer, batch_size: int) -> None:
    listed = pairs()
    likely = model(torch.tensor([listed[1].context])).logits[0, -1].argmax()
    listed.append(Pair(listed[1].context, [int(likely)]))
    found = score(model, listed, WINDOW, batch_size)
    assert [one.greedy for one in found] == [plainly(model, pair)[1] for pair in listed]
    assert found[-1].greedy
    for one, pair in zip(found, listed, strict=True):
        assert one.log_probability == pytest.approx(plainly(model, pair)[0], abs=1e-4)


def test_every_mistake_is_named(model: Transformer) -> None:
    wrong = [Pair([], [1]), Pair([1], []), Pair([1], [1] * 9), Pair([1], [VOCAB]), Pair([1], [2])]
    with pytest.raises(
        ValueError, match=r"pair 0 .*context; pair 1 .*continuation; pair 2: .*9.*window.*; pair 3: .*40"
    ):
        score(model, wrong, WINDOW)
    assert len(score(model, wrong[4:], WINDOW)) == 1
