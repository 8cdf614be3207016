"""Cached decoding equals uncached; the cache has the size of its formula; padding and stale slots influence nothing."""

import random
from dataclasses import replace

import pytest
import torch

import model.absorbed
from launch.config import read
from model.config import ModelConfig, YarnConfig
from model.decoder import Decoder
from model.latent_cache import LatentCache, latent_bytes, latent_width
from model.slots import place, placement
from tests.unit.literal_model import TINY, Literal, build


def random_config(seed: int) -> ModelConfig:
    """A shape drawn at random: heads, ranks, groups, dense layers, shared experts, YaRN, query compression, scoring."""
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    v3 = draw.random() < 0.7
    greedy = not v3 and draw.random() < 0.5
    if greedy:
        groups = 1
    layers = draw.randint(1, 4)
    return ModelConfig(
        vocab_size=draw.choice([17, 50, 61]), hidden_size=draw.choice([16, 24, 40]), num_hidden_layers=layers,
        num_nextn_predict_layers=draw.randint(0, 2), num_attention_heads=draw.choice([1, 2, 3]),
        q_lora_rank=draw.choice([None, 5, 12]), kv_lora_rank=draw.choice([3, 8, 13]),
        qk_nope_head_dim=draw.choice([3, 6, 8]), qk_rope_head_dim=draw.choice([2, 4, 8]),
        v_head_dim=draw.choice([5, 8, 15]), intermediate_size=20, moe_intermediate_size=draw.choice([6, 12]),
        first_k_dense_replace=draw.randint(0, layers), n_routed_experts=8, n_shared_experts=draw.randint(0, 2),
        num_experts_per_tok=draw.randint(1, 4), n_group=groups, topk_group=max(1, groups // 2),
        scoring_func="sigmoid" if v3 else "softmax",
        topk_method="noaux_tc" if v3 else "greedy" if greedy else "group_limited_greedy",
        norm_topk_prob=draw.random() < 0.7, max_position_embeddings=64, initializer_range=0.2,
        rope_scaling=YarnConfig(4.0, 16, 3.0, 0.5, draw.choice([0.707, 1.0]), 1.0) if draw.random() < 0.4 else None,
    )  # fmt: skip


def decode(model, sequences, counts, draw):
    """Logits of every token, fed in ragged pieces of `counts` tokens; rows end at their own times."""
    decoder = Decoder(model, len(sequences))
    found, at = [[] for _ in sequences], [0] * len(sequences)
    while rows := [i for i, sequence in enumerate(sequences) if at[i] < len(sequence)]:
        new = [sequences[i][at[i] : at[i] + draw.choice(counts)] for i in rows]
        hidden, span = decoder.extend(rows, new)
        for i, tokens, logits in zip(rows, new, span.of_rows(decoder.logits(hidden)), strict=True):
            found[i].append(logits)
            at[i] += len(tokens)
    assert decoder.cache.lengths == [len(sequence) for sequence in sequences]
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("seed", range(24))
def test_cached_logits_equal_uncached_ones(monkeypatch, seed):
    config = random_config(seed)
    assert not config.problems()
    net, draw = build(config, seed).eval(), random.Random(seed)
    if config.first_k_dense_replace < config.num_hidden_layers:  # experts in other slots than those of their numbers
        place(net, torch.stack([torch.randperm(8) for _ in placement(net)]))
    sequences = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in (13, 5, 22, 1)]
    with torch.no_grad():
        expected = [net(torch.tensor([sequence])).logits[0] for sequence in sequences]
    monkeypatch.setattr(model.absorbed, "EXPAND_FROM", 4)
    for counts in ([1], [1, 2, 3, 7], [30]):  # one at a time, ragged, the whole prompt
        for found, wanted in zip(decode(net, sequences, counts, draw), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_cached_logits_equal_the_literal_models_losses():
    model = build().eval()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    (logits,) = decode(model, [tokens[:-1]], [3], random.Random(0))
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    expected = Literal(model).losses(tokens[:-1], tokens[1:], [0] * 10)[0]
    torch.testing.assert_close(losses.double(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("expand_from", [1, 1000])
def test_a_prompt_in_either_form_fills_the_cache_alike(monkeypatch, expand_from):
    monkeypatch.setattr(model.absorbed, "EXPAND_FROM", expand_from)
    net = build(replace(TINY, rope_scaling=YarnConfig(8.0, 16, 4.0, 1.0, 1.0, 1.0))).eval()
    prompt = list(range(20))
    with torch.no_grad():
        expected = net(torch.tensor([[*prompt, 7]])).logits[0]
    decoder = Decoder(net, 2)
    first, span = decoder.extend([0, 1], [prompt, prompt[:4]])
    torch.testing.assert_close(decoder.logits(span.of_rows(first)[0]), expected[:20], rtol=1e-5, atol=1e-5)
    last, _ = decoder.extend([0], [[7]])
    torch.testing.assert_close(decoder.logits(last)[0], expected[20], rtol=1e-5, atol=1e-5)


def test_what_lies_behind_a_rows_length_or_in_other_rows_changes_nothing():
    net = build().eval()
    clean, dirty = Decoder(net, 3), Decoder(net, 3)
    for layer in dirty.cache.layers:
        layer.normal_(std=100.0)
    for tokens in ([list(range(12)), [7], [1, 2, 3]], [[5], [6, 7, 8], [9, 9]], [[1], [1], [1]]):
        one, _ = clean.extend([0, 1, 2], tokens)
        other, _ = dirty.extend([0, 1, 2], tokens)
        assert torch.equal(one, other)


@pytest.mark.parametrize("lengths", [(40, 5), (3, 1)], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("seed", range(6))
def test_filling_writes_the_entries_of_extending(lengths, seed):
    net = build(random_config(seed), seed).eval()
    filled, extended = Decoder(net, 2), Decoder(net, 2)
    for tokens in ([[(3 * i) % 17 for i in range(n)] for n in lengths], [[8, 9], [4, 5, 6]]):
        filled.fill([0, 1], tokens)
        extended.extend([0, 1], tokens)
    assert filled.cache.lengths == extended.cache.lengths == [lengths[0] + 2, lengths[1] + 3]
    for one, other in zip(filled.cache.layers, extended.cache.layers, strict=True):
        for row, length in enumerate(extended.cache.lengths):
            assert one[row, :length].count_nonzero() > 0
            torch.testing.assert_close(one[row, :length], other[row, :length], rtol=1e-6, atol=1e-6)


def test_truncation_brings_back_the_earlier_state():
    net = build().eval()
    straight, winding = Decoder(net, 2), Decoder(net, 2)
    for decoder in (straight, winding):
        decoder.extend([0, 1], [[1, 2, 3], [4]])
    winding.extend([0, 1], [[40, 41, 42], [43, 44, 45]])
    winding.cache.truncate(0, 3)
    winding.cache.truncate(1, 2)
    straight.extend([1], [[43]])
    hidden = [decoder.extend([0, 1], [[5, 6], [7]])[0] for decoder in (straight, winding)]
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="row 1 has 3 tokens and cannot be cut to 4"):
        winding.cache.truncate(1, 4)


def test_the_buffer_grows_and_rows_leave_without_a_trace():
    net = build().eval()
    decoder = Decoder(net, 3)
    decoder.cache.capacity = 64
    tokens = [list(range(40)), list(range(10, 50)), list(range(5, 45))]
    decoder.extend([0, 1, 2], tokens)
    decoder.extend([0, 1, 2], [[1] * 30] * 3)
    assert decoder.cache.capacity == 128
    decoder.cache.select([2, 0])
    hidden, _ = decoder.extend([0, 1], [[8], [8]])
    for row, place_before in enumerate((2, 0)):
        alone = Decoder(net, 1)
        expected, _ = alone.extend([0], [[*tokens[place_before], *[1] * 30, 8]])
        torch.testing.assert_close(hidden[row], expected[-1], rtol=1e-5, atol=1e-5)


def test_size_is_that_of_the_formula():
    v3 = read("v3-671b", [], []).model
    assert (v3.num_hidden_layers, latent_width(v3)) == (61, 576)
    assert latent_bytes(v3) == 61 * 576 * 2 == 70_272
    assert latent_bytes(TINY, 10, 4) == 2 * (8 + 4) * 4 * 10
    cache = LatentCache(TINY.num_hidden_layers, latent_width(TINY), rows=3, capacity=10)
    assert cache.nbytes == 3 * latent_bytes(TINY, 10, 4)
    decoder = Decoder(build(), 2)
    assert decoder.cache.nbytes == 2 * latent_bytes(TINY, decoder.cache.capacity, 4)


def test_decoding_leaves_the_model_as_it_was():
    net = build().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Decoder(net, 1).extend([0], [[1, 2, 3]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in net.parameters())


def test_bfloat16_weights_have_a_bfloat16_cache_and_stay_near():
    net = build().eval()
    with torch.no_grad():
        exact = net(torch.tensor([[1, 2, 3, 4, 5]])).logits[0]
    decoder = Decoder(net.bfloat16(), 1)
    hidden, _ = decoder.extend([0], [[1, 2, 3]])
    logits = [decoder.logits(hidden), *(decoder.logits(decoder.extend([0], [[token]])[0]) for token in (4, 5))]
    assert decoder.cache.layers[0].dtype == torch.bfloat16
    assert (torch.cat(logits) - exact).abs().mean() < 0.1
