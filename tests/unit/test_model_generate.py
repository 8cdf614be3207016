"""Generation: greedy follows the logits, draws depend on the seed, wrong input is refused."""

import pytest
import torch

from model.decoder import can_cache
from model.generate import generate, next_logits
from model.generation import Generation, Request
from model.sampling import Sampling
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


def test_weights_that_are_here_during_their_modules_forward_only_are_enough():
    """As under an engine that shards them: the whole context is computed through the modules."""
    whole, net = build(), build()
    expected = list(generate(whole, [3, 1, 4], 5)), list(generate(whole, [3], 9, 1.0, 2, max_context=4))

    def bring(module, inputs):
        for parameter, values in module.held:
            parameter.data = values

    def take(module, inputs, output):
        for parameter, _ in module.held:
            parameter.data = parameter.new_empty(0)

    for module in net.modules():
        module.held = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
        take(module, (), None)
    assert not can_cache(net) and can_cache(whole)
    assert list(generate(net, [3, 1, 4], 5)) == expected[0]
    assert list(generate(net, [3], 9, 1.0, 2, max_context=4)) == expected[1]
    with pytest.raises(ValueError, match="weights are not all here"):
        Generation(net, [Request([1], 1)], Sampling())
