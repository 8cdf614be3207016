"""Generation: greedy follows the logits, draws depend on the seed, wrong input is refused."""

import pytest
import torch

from model.generate import generate, next_logits
from tests.unit.literal_model import TINY, build


def test_greedy_takes_the_largest_logit_each_time():
    model = build()
    out = list(generate(model, [3, 1, 4], 5))
    context = [3, 1, 4]
    for token in out:
        assert token == int(next_logits(model, context).argmax())
        context.append(token)
    assert len(out) == 5


def test_draws_repeat_with_the_seed_and_follow_the_temperature():
    model = build()
    first = list(generate(model, [3], 20, temperature=1.0, seed=5))
    assert first == list(generate(model, [3], 20, temperature=1.0, seed=5))
    assert first != list(generate(model, [3], 20, temperature=1.0, seed=6))
    assert list(generate(model, [3], 8, temperature=1e-4, seed=5)) == list(generate(model, [3], 8))


def test_end_of_document_stops_and_is_not_yielded():
    model = build()
    whole = list(generate(model, [3, 1, 4], 6))
    stop = whole[2]
    assert list(generate(model, [3, 1, 4], 6, eod_id=stop)) == whole[: whole.index(stop)]


def test_only_the_last_tokens_are_looked_at():
    model = build()
    assert list(generate(model, [9, 9, 9, 3, 1], 1, max_context=2)) == list(generate(model, [3, 1], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [TINY.vocab_size]}, "outside the model's vocabulary of 50"),
        ({"prompt_ids": [1], "temperature": -1.0}, "temperature = -1.0"),
        ({"prompt_ids": [1], "max_context": 0}, "max_context = 0"),
    ],
)
def test_wrong_input_is_refused_at_the_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), max_new_tokens=1, **arguments)


def test_no_gradient_is_kept():
    assert not next_logits(build(), [1, 2]).requires_grad
    assert torch.is_grad_enabled()
