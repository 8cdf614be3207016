"""Evaluation predicts every held-out token once, counts its choices once, and leaves the bias alone."""

import math

import numpy as np
import pytest
import torch

from data.dataset import HeldoutDocument
from launch.evaluate import evaluate, predict
from model.config import ModelConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.transformer import Transformer

VOCAB, WINDOW, EOD = 40, 8, 0
LENGTHS = (20, 3, 8, 1)


def build(depths: int = 0, dense_layers: int = 1) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_nextn_predict_layers=depths, num_attention_heads=2,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16,
        moe_intermediate_size=8, first_k_dense_replace=dense_layers, n_routed_experts=6, num_experts_per_tok=2,
        n_group=1, topk_group=1, initializer_range=0.5,
    )  # fmt: skip
    model = Transformer(config, LocalExchange())
    init_weights(model, seed=1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, 6))
    return model.eval()


def documents() -> list[HeldoutDocument]:
    draw = np.random.default_rng(3)
    made = [np.append(draw.integers(1, VOCAB, length - 1), EOD).astype(np.int64) for length in LENGTHS]
    return [HeldoutDocument(str(i), bytes(2 * len(tokens)), tokens) for i, tokens in enumerate(made)]


def choices_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """(M, E) of one sequence without padding, from the model's own statistics."""
    with torch.no_grad():
        return model(tokens[None, :-1], None, tokens[None, 1:]).routing.tokens_per_expert


@pytest.mark.parametrize("stride", [None, WINDOW, 3])
def test_every_token_is_predicted_and_counted_once(stride: int | None) -> None:
    model, listed = build(), documents()
    found = predict(model, listed, EOD, WINDOW, stride, batch_size=3)
    assert (found.n_tokens, found.n_documents) == (sum(LENGTHS), len(LENGTHS))
    assert found.tokens_per_expert.shape == (len(LENGTHS), 2, 6) and found.tokens_per_expert.dtype == torch.int64
    for row, length in zip(found.tokens_per_expert, LENGTHS, strict=True):
        assert row.sum(-1).tolist() == [2 * length, 2 * length]
    assert found.raw_bytes == 2 * sum(LENGTHS)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / (2 * sum(LENGTHS)))


def test_counts_are_the_models_own_where_a_document_fits_into_one_window() -> None:
    model, listed = build(), documents()
    found = predict(model, listed, EOD, WINDOW)
    for number in (1, 2, 3):  # 8 tokens and fewer
        stream = torch.cat((torch.tensor([EOD]), torch.from_numpy(listed[number].tokens)))
        assert torch.equal(found.tokens_per_expert[number], choices_of(model, stream))
    # windows without overlap: the long document's choices are those of its three pieces
    stream = torch.cat((torch.tensor([EOD]), torch.from_numpy(listed[0].tokens)))
    pieces = [choices_of(model, stream[start : start + WINDOW + 1]) for start in (0, WINDOW, 2 * WINDOW)]
    apart = predict(model, listed, EOD, WINDOW, stride=WINDOW)
    assert torch.equal(apart.tokens_per_expert[0], pieces[0] + pieces[1] + pieces[2])
    assert not torch.equal(found.tokens_per_expert[0], apart.tokens_per_expert[0])  # context changes choices


def test_prediction_modules_are_counted_where_they_have_a_target() -> None:
    model = build(depths=2)
    found = predict(model, documents(), EOD, WINDOW, stride=WINDOW)
    assert found.tokens_per_expert.shape == (len(LENGTHS), 4, 6)
    for row, length in zip(found.tokens_per_expert, LENGTHS, strict=True):
        full, rest = divmod(length, WINDOW)
        by_depth = [2 * (full * (WINDOW - k) + max(0, rest - k)) for k in (1, 2)]
        assert row.sum(-1).tolist() == [2 * length, 2 * length, *by_depth]


def test_the_model_is_left_as_it_was() -> None:
    model = build(depths=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    evaluate(model, documents(), EOD, WINDOW)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dense_model_has_no_rows() -> None:
    found = evaluate(build(dense_layers=3), documents(), EOD, WINDOW)
    assert found.tokens_per_expert.shape == (len(LENGTHS), 0, 6)
    assert found.compressed.raw_bytes == found.raw_bytes and math.isfinite(found.loss)
