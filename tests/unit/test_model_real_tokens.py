"""Padding goes to no expert and counts nowhere; prediction modules stay inside their documents."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launch.losses import Weights, batch_balance, compute_losses, target_counts, target_masks
from model.real_tokens import find_real
from model.routing_stats import Collect
from model.transformer import Transformer
from tests.unit.literal_model import TINY, batch, build

CONFIG = replace(TINY, num_nextn_predict_layers=2)
WEIGHTS = Weights(0.3, 0.1, 0.1)
SHORT, LONG = 9, 18  # half of the longer sequences is padding


def shares(model: Transformer, tokens: Tensor, targets: Tensor, docs: Tensor, real: Tensor | None):
    """Output, losses and gradients of one micro-batch with every balance loss."""
    model.zero_grad()
    output = model(tokens, docs, targets, Collect(True, True), real)
    mask = torch.ones(tokens.shape, dtype=torch.bool) if real is None else real
    counts = target_counts([mask], 2, [docs]).tolist()
    balance = batch_balance(output.routing.score_sums, output.routing.tokens_per_expert, CONFIG.num_experts_per_tok)
    n_sequences = int(mask.any(1).sum())
    losses = compute_losses(output, mask, counts, n_sequences, WEIGHTS, balance, docs)
    losses.total.backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return output, losses, grads


def padded(x: Tensor, value: int, extra: int = 1) -> Tensor:
    """(B, SHORT) -> (B + extra, LONG): each sequence's tail, and whole sequences more, are `value`."""
    out = torch.full((x.shape[0] + extra, LONG), value, dtype=x.dtype)
    out[: x.shape[0], :SHORT] = x
    return out


@pytest.mark.parametrize("recompute", [False, True])
def test_half_of_padding_changes_nothing(recompute: bool) -> None:
    tokens, targets = batch(CONFIG, 3, SHORT)
    docs = (torch.arange(SHORT).expand(3, -1) >= torch.tensor([[4], [6], [9]])).long()
    model = build(CONFIG, recompute=recompute)
    output, losses, grads = shares(model, tokens, targets, docs, None)
    real = padded(torch.ones(3, SHORT, dtype=torch.bool), 0)
    last = torch.cat([docs, docs[:, -1:].expand(-1, LONG - SHORT)], 1)
    ids = torch.cat([last, torch.zeros(1, LONG, dtype=torch.int64)])
    found, other, theirs = shares(model, padded(tokens, 5), padded(targets, 5), ids, real)
    for field in ("tokens_per_expert", "changed_by_bias", "bias_histogram", "coactivation"):
        assert torch.equal(getattr(found.routing, field), getattr(output.routing, field)), field
    for field in ("sequence_balance", "score_sums", "gate_entropy"):
        torch.testing.assert_close(getattr(found.routing, field), getattr(output.routing, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.sums, losses.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.total, losses.total, rtol=1e-5, atol=1e-6)
    assert theirs.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_of_padding_alone_has_zero_losses_and_gradients() -> None:
    tokens, targets = batch(CONFIG, 2, SHORT)
    real = torch.zeros(2, SHORT, dtype=torch.bool)
    output, losses, grads = shares(build(CONFIG), tokens, targets, torch.zeros_like(tokens), real)
    assert not output.routing.tokens_per_expert.any() and not losses.sums.any()
    assert torch.isfinite(output.token_losses).all()
    assert len(grads) == len(list(build(CONFIG).parameters())) and not any(one.any() for one in grads.values())


def test_padding_sends_no_rows_to_experts() -> None:
    model, rows = build(CONFIG), []
    for module in model.modules():
        if hasattr(module, "inspect"):
            module.inspect = lambda what, x, per_expert: rows.append(x.shape[0])
    tokens, targets = batch(CONFIG, 2, SHORT)
    real = torch.arange(SHORT).expand(2, -1) < 4
    model(tokens, None, targets, None, real)
    assert set(rows) == {2 * n * CONFIG.num_experts_per_tok for n in (4, 3, 2)}  # modules see one and two fewer


def test_all_positions_real_take_the_plain_way_bit_for_bit() -> None:
    tokens, targets = batch(CONFIG, 2, SHORT)
    assert find_real(torch.ones(2, SHORT, dtype=torch.bool), torch.zeros_like(tokens), 2) == (False, [None] * 3)
    model = build(CONFIG)
    plain = model(tokens, None, targets)
    marked = model(tokens, torch.zeros_like(tokens), targets, None, torch.ones(2, SHORT, dtype=torch.bool))
    assert torch.equal(plain.token_losses, marked.token_losses)
    assert all(map(torch.equal, plain.routing, marked.routing))


def test_prediction_modules_never_look_into_the_next_document() -> None:
    """Nothing of the first document changes with the tokens of the second, padding behind it included."""
    docs = torch.tensor([[0] * 5 + [1] * 4])
    real = torch.tensor([[True] * 8 + [False]])
    masks = target_masks(real, 2, docs)
    assert [one.int().tolist()[0] for one in masks] == [
        [1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0],
    ]  # fmt: skip
    model = build(CONFIG)
    tokens, targets = batch(CONFIG, 1, 9)
    other, further = tokens.clone(), targets.clone()
    other[:, 5:] = (other[:, 5:] + 3) % CONFIG.vocab_size
    further[:, 5:] = (further[:, 5:] + 3) % CONFIG.vocab_size

    def of_first(inputs: Tensor, goals: Tensor) -> list[Tensor]:
        output = model(inputs, docs, goals, None, real)
        losses = (output.token_losses, *output.mtp_token_losses)
        kept = [loss[mask & (docs == 0)] for loss, mask in zip(losses, masks, strict=True)]
        return [*kept, *torch.autograd.grad(sum(one.sum() for one in kept), model.parameters(), allow_unused=True)]

    for one, two in zip(of_first(tokens, targets), of_first(other, further), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    joined = model(tokens, docs, targets, None, real).routing.tokens_per_expert.sum(1) // CONFIG.num_experts_per_tok
    assert joined.tolist()[-2:] == [4 + 2, 3 + 1]
