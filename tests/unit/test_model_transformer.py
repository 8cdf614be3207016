"""The whole model against the literal one; documents, causality, recomputation."""

from dataclasses import replace

import pytest
import torch

import model.router
import model.transformer
from model.config import YarnConfig
from model.exchange import LocalExchange
from model.real_tokens import find_real
from model.router import RoutingMemory
from model.transformer import Transformer
from tests.unit.literal_model import TINY, Literal, batch, build

VARIANTS = {
    "v3": TINY,
    "full queries": replace(TINY, q_lora_rank=None),
    "two modules": replace(TINY, num_nextn_predict_layers=2),
    "wide values, two shared": replace(TINY, v_head_dim=12, n_shared_experts=2),
    "yarn": replace(TINY, rope_scaling=YarnConfig(8.0, 16, 4.0, 1.0, 1.0, 1.0)),
    "yarn, two temperatures": replace(
        TINY, qk_rope_head_dim=8, rope_scaling=YarnConfig(4.0, 32, 3.0, 0.5, mscale=0.707, mscale_all_dim=1.0)
    ),
    "v2": replace(TINY, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False),
    "v2-lite": replace(
        TINY, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None,
        norm_topk_prob=False, n_shared_experts=2, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_statistics_equal_the_literal_model(variant):
    config = VARIANTS[variant]
    model = build(config)
    tokens, targets = batch(config, 2, 11)
    docs = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [0] * 11])
    output = model(tokens, docs, targets)
    literal = Literal(model)
    for b in range(2):
        main, *deeper = literal.losses(tokens[b].tolist(), targets[b].tolist(), docs[b].tolist())
        torch.testing.assert_close(output.token_losses[b].double(), torch.tensor(main).double(), rtol=2e-5, atol=1e-5)
        for k, losses in enumerate(deeper, start=1):
            expected = torch.tensor(losses + [0.0] * k).double()
            torch.testing.assert_close(output.mtp_token_losses[k - 1][b].double(), expected, rtol=2e-5, atol=1e-5)
    assert output.logits is None
    routing = output.routing
    assert routing.tokens_per_expert.tolist() == [literal.counts[name] for name in config.moe_layers]
    assert routing.changed_by_bias.tolist() == [literal.changed[name] for name in config.moe_layers]
    assert routing.sequence_balance.item() == pytest.approx(literal.balance, rel=1e-5)


def test_logits_agree_with_losses_and_leave_modules_out():
    model = build()
    tokens, targets = batch(TINY, 2, 8)
    output = model(tokens)
    losses = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, model(tokens, None, targets).token_losses, rtol=1e-5, atol=1e-5)
    assert output.token_losses is None
    assert output.mtp_token_losses == ()
    assert output.routing.tokens_per_expert.sum(1).tolist() == [2 * 8 * 2, 0]


def test_two_documents_in_one_sequence_equal_the_two_alone():
    config = replace(TINY, num_nextn_predict_layers=0)
    model = build(config)
    tokens, targets = batch(config, 1, 20)
    docs = (torch.arange(20) >= 7).long()[None]
    together = model(tokens, docs, targets).token_losses
    first = model(tokens[:, :7], None, targets[:, :7]).token_losses
    second = model(tokens[:, 7:], None, targets[:, 7:]).token_losses
    torch.testing.assert_close(together, torch.cat([first, second], 1), rtol=1e-5, atol=1e-5)
    unmasked = model(tokens, None, targets).token_losses
    assert (unmasked - together)[:, 7:].abs().max() > 1e-3


def test_one_document_takes_the_causal_path_and_gives_the_same():
    docs = torch.full((2, 9), 3)
    assert find_real(None, docs, 0) == find_real(None, None, 0) == (False, [None])
    model = build()
    tokens, targets = batch(TINY, 2, 9)
    plain = model(tokens, None, targets).token_losses
    torch.testing.assert_close(model(tokens, docs, targets).token_losses, plain, rtol=0, atol=0)
    docs[1, 5:] = 4  # now both sequences take the masked path, the first with one document
    torch.testing.assert_close(model(tokens, docs, targets).token_losses[0], plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_no_earlier_loss(masked):
    config = replace(TINY, num_nextn_predict_layers=2)
    model = build(config)
    tokens, targets = batch(config, 1, 12)
    docs = torch.tensor([[0] * 3 + [1] * 9]) if masked else None
    before = model(tokens, docs, targets)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % config.vocab_size
    after = model(changed, docs, targets)
    torch.testing.assert_close(after.token_losses[0, :8], before.token_losses[0, :8], rtol=1e-6, atol=1e-6)
    assert after.token_losses[0, 8] != before.token_losses[0, 8]
    for k in (1, 2):  # module k at t reads token t + k
        old, new = before.mtp_token_losses[k - 1][0], after.mtp_token_losses[k - 1][0]
        torch.testing.assert_close(new[: 8 - k], old[: 8 - k], rtol=1e-6, atol=1e-6)
        assert new[8 - k] != old[8 - k]


def test_gradient_of_every_parameter_exists_and_forward_changes_no_buffer():
    model = build()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens, targets = batch(TINY, 4, 16)
    backward(model, tokens, targets)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def backward(model, tokens, targets, docs=None):
    output = model(tokens, docs, targets)
    deeper = sum(losses.mean() for losses in output.mtp_token_losses)
    (output.token_losses.mean() + 0.3 * deeper + 0.01 * output.routing.sequence_balance).backward()
    return output


@pytest.mark.parametrize("masked", [False, True])
def test_recomputation_gives_the_same_losses_gradients_and_counts(masked):
    tokens, targets = batch(TINY, 2, 10)
    docs = torch.tensor([[0] * 4 + [1] * 6, [0] * 10]) if masked else None
    plain, again = build(), build(recompute=True)
    first, second = backward(plain, tokens, targets, docs), backward(again, tokens, targets, docs)
    assert torch.equal(first.token_losses, second.token_losses)
    assert torch.equal(first.routing.tokens_per_expert, second.routing.tokens_per_expert)
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=name)


class _NudgedFunctions:
    """Stands in for the router's torch.nn.functional: from the call after the first n on, the second expert of a tied
    pair scores a millionth more."""

    def __init__(self, first_calls: int) -> None:
        self.left, self.nudged = first_calls, 0

    def linear(self, x, weight):
        logits = torch.nn.functional.linear(x, weight)
        self.left -= 1
        if self.left < 0:
            self.nudged += 1
            logits = logits + 1e-6 * torch.nn.functional.one_hot(torch.tensor(1), logits.shape[1])
        return logits


class _Forgetful(RoutingMemory):
    """A routing memory that remembers nothing."""

    topk_ids = property(lambda self: None, lambda self, ids: None)


def _tied(recompute: bool):
    """Experts 0 and 1 score alike for every token, so that a millionth decides where only one of the two is chosen."""
    model = build(replace(TINY, n_group=1, topk_group=1), bias=0.0, recompute=recompute)
    with torch.no_grad():
        for path in model.config.moe_layers:
            gate = model.get_submodule(path).mlp.gate
            gate.weight[1] = gate.weight[0]
    return model


@pytest.mark.parametrize("forgets", [False, True])
def test_a_near_tie_that_would_flip_in_recomputation_changes_nothing(monkeypatch, forgets):
    tokens, targets = batch(TINY, 2, 16)
    plain, again = _tied(False), _tied(True)
    first = backward(plain, tokens, targets)
    nudged = _NudgedFunctions(first_calls=2)
    monkeypatch.setattr(model.router, "F", nudged)
    if forgets:  # the control: without the memory the same nudge moves rows to another expert
        monkeypatch.setattr(model.transformer, "RoutingMemory", _Forgetful)
    second = backward(again, tokens, targets)
    assert nudged.nudged == 2  # both layers with experts were computed again
    assert torch.equal(first.routing.tokens_per_expert, second.routing.tokens_per_expert)
    assert torch.equal(first.routing.changed_by_bias, second.routing.changed_by_bias)
    worst = max((a.grad - b.grad).abs().max() for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert (worst > 1e-3) if forgets else (worst < 1e-5)


def test_sequences_too_short_for_the_modules_are_refused():
    model = build(replace(TINY, num_nextn_predict_layers=2))
    tokens, targets = batch(TINY, 1, 2)
    with pytest.raises(ValueError, match="at least 3 tokens"):
        model(tokens, None, targets)


def test_bf16_model_runs_and_stays_near_fp32():
    model = build(bias=0.5)
    tokens, targets = batch(TINY, 2, 8)
    exact = model(tokens, None, targets).token_losses
    rough = model.bfloat16()(tokens, None, targets)
    assert rough.token_losses.dtype == torch.float32
    assert (rough.token_losses - exact).abs().mean() < 0.1
    backward(model, tokens, targets)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_a_model_without_experts_reports_empty_statistics():
    config = replace(TINY, first_k_dense_replace=2, num_nextn_predict_layers=0)
    tokens, targets = batch(config, 1, 6)
    routing = build(config)(tokens, None, targets).routing
    assert routing.tokens_per_expert.shape == (0, config.n_routed_experts)
    assert routing.sequence_balance.item() == 0.0


def test_weights_are_nan_until_they_get_values():
    fresh = Transformer(TINY, LocalExchange())
    assert all(torch.isnan(parameter).all() for parameter in fresh.parameters())
