"""Rounded weights: near the exact ones, by the format's own arithmetic, in every place that generation uses them."""

from dataclasses import replace

import pytest
import torch

from kernels.quantized import dequantize, quantize_matrix, quantized_linear
from launch.evaluate import predict
from model.decoder import Decoder
from model.drafts import ModuleDrafts
from model.generate import generate
from model.generation import Generation, Request
from model.quantize import QuantizedExperts, QuantizedHead, QuantizedLinear, quantize
from model.sampling import Sampling
from tests.unit.literal_model import TINY, batch, build
from tests.unit.test_launch_evaluate import EOD, WINDOW, documents
from tests.unit.test_launch_evaluate import build as build_evaluated

SHAPES = [(48, 96), (20, 34), (16, 32), (7, 10)]  # the first and third are taken by torch's operators


def literal_values(matrix, n_in):
    """Code by code, in Python: for codes two to a byte or one."""
    rows = []
    for row in range(matrix.scales.shape[0]):
        stored = matrix.codes[row].tolist()
        if matrix.bits == 4:
            stored = [code - 8 for byte in stored for code in (byte % 16, byte // 16)]
        size = n_in // matrix.scales.shape[1]
        offsets = [0.0] * matrix.scales.shape[1] if matrix.offsets is None else matrix.offsets[row].tolist()
        scales = matrix.scales[row].tolist()
        rows.append([code * scales[i // size] + offsets[i // size] for i, code in enumerate(stored)])
    return torch.tensor(rows)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [None, 2, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_within_a_step_of_the_weights(shape, bits, group_size, zero_points):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    weight[0] = 0.0
    matrix = quantize_matrix(weight, bits, group_size, zero_points)
    size = shape[1] if group_size is None or shape[1] % group_size else group_size
    assert (
        matrix.scales.shape == (shape[0], shape[1] // size) and matrix.codes.nbytes == shape[0] * shape[1] * bits // 8
    )
    values = dequantize(matrix)
    if not matrix.torch_op or bits == 8:
        torch.testing.assert_close(values, literal_values(matrix, shape[1]), rtol=1e-6, atol=1e-7)
    steps = matrix.scales.float().repeat_interleave(size, 1)
    distance = (values - weight).abs() / steps.clamp(min=1e-9)
    # To nearest: half a step. Ends of a range that the search or bfloat16 has narrowed are further off.
    inside = distance[1:].flatten().sort().values[: int(0.9 * distance[1:].numel())] if size > 2 else distance[:0]
    assert (inside <= 0.5 + 1e-3).all() and (values - weight).abs().max() < weight.abs().max() * (
        0.02 if bits == 8 else 0.3
    )
    assert (values[0] == 0).all()
    plain = quantize_matrix(weight[:, :size], bits, None, zero_points)
    assert torch.equal(plain.scales[:, 0], matrix.scales[:, 0])  # groups are rounded by themselves


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_values(shape, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    matrix = quantize_matrix(weight, bits, 32 if bits == 4 else None, bits == 4)
    assert matrix.torch_op == (shape in (SHAPES[0], SHAPES[2]))
    for rows in (1, 5, 70):
        x = torch.randn(rows, shape[1])
        exact = x @ dequantize(matrix).t()
        found = quantized_linear(x, matrix)
        assert found.dtype == torch.float32
        # torch's operators round rows and results to bfloat16
        limit = 0.01 if matrix.torch_op else 1e-6
        assert (found - exact).abs().max() <= limit * exact.abs().max()


def test_more_bits_and_smaller_groups_and_zero_points_are_nearer():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)) + 0.5

    def error(*rule):
        return (dequantize(quantize_matrix(weight, *rule)) - weight).square().mean().item()

    assert error(8, None, False) < error(4, 32, True) < error(4, 32, False) < error(4, None, False)
    clipped = (dequantize(quantize_matrix(weight, 4, 128, False)) - weight).square().mean()
    step = weight.abs().amax(1, keepdim=True) / 7
    assert clipped < ((weight / step).round() * step - weight).square().mean()  # the search beats the whole range


def wide(**changes):
    """Large enough for torch's operators, small enough for a test."""
    base = replace(
        TINY, vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, q_lora_rank=32,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [TINY, wide(), wide(q_lora_rank=None)])
def test_a_quantised_model_stays_near_and_its_cache_equals_no_cache(config, bits):
    net = build(config).eval()
    tokens, targets = batch(config, 2, 12)
    with torch.no_grad():
        exact = net(tokens, None, targets).token_losses.mean()
        size = quantize(net, bits)
        rounded = net(tokens, None, targets)
        logits = net(tokens).logits
    assert (rounded.token_losses.mean() - exact).abs() < (0.15 if bits == 8 else 0.5)  # random weights: choices flip
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(rounded.token_losses, losses, rtol=1e-4, atol=1e-4)
    assert size.after < size.before * (0.55 if bits == 8 else 0.5)
    decoder = Decoder(net, 2)
    hidden, span = decoder.extend([0, 1], tokens[:, :5].tolist())
    found = [span.last(decoder.logits(hidden))]
    for column in range(5, 12):
        hidden, _ = decoder.extend([0, 1], tokens[:, column : column + 1].tolist())
        found.append(decoder.logits(hidden))
    # not to 1e-5: rows are rounded to bfloat16, and a last bit's difference before it is one of 2^-9 behind it
    assert (torch.stack(found, 1) - logits[:, 4:]).abs().max() < 0.05 * logits.abs().max()


def test_every_matrix_but_those_named_is_rounded():
    net = build(replace(TINY, num_nextn_predict_layers=1))
    size = quantize(net, 4)
    left = {name for name, parameter in net.named_parameters() if parameter.dim() > 1}
    assert {name.rsplit(".", 2)[-2] for name in left} == {"embed_tokens", "kv_b_proj", "gate"}
    kinds = [type(module) for module in net.modules()]
    assert kinds.count(QuantizedExperts) == 2 and kinds.count(QuantizedHead) == 1
    assert size.n_matrices == kinds.count(QuantizedLinear) + 1 + 2 * 2 * TINY.n_routed_experts
    assert net.lm_head.matrix.bits == 8
    with pytest.raises(ValueError, match="quantised already"):
        quantize(net, 8)
    with pytest.raises(ValueError, match=r"(?s)3 bits is not known.*group size 5"):
        quantize(build(), 3, 5)


def test_generation_with_drafts_and_evaluation_run_on_rounded_weights():
    net = build(wide()).eval()
    quantize(net, 8)
    plain = list(generate(net, [3, 1, 4], 8))
    generation = Generation(net, [Request([3, 1, 4], 8)], Sampling(), drafter=lambda rows: ModuleDrafts(net, rows))
    drafted = []
    while not generation.done:
        drafted += [token for event in generation.step() for token in event.tokens]
    assert len(plain) == len(drafted) == 8
    net = build_evaluated(depths=1)
    exact = predict(net, documents(), EOD, WINDOW)
    quantize(net, 8)
    found = predict(net, documents(), EOD, WINDOW)
    assert found.n_tokens == exact.n_tokens and found.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.03)
