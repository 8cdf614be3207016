"""Logical pieces and initial values are the same however the experts are split."""

import math

import pytest
import torch

from model.exchange import LocalExchange
from model.init import init_weights, stable_seed
from model.naming import is_expert, pieces
from model.slots import local_experts
from model.transformer import Transformer
from tests.unit.literal_model import TINY


class _Part(LocalExchange):
    """One rank of several; holds its experts, exchanges nothing."""

    def __init__(self, ep_size: int, ep_rank: int) -> None:
        self.ep_size, self.ep_rank = ep_size, ep_rank


def logical(ep_size: int, ep_rank: int, seed: int = 7, **options) -> dict[str, torch.Tensor]:
    model = Transformer(TINY, _Part(ep_size, ep_rank), **options)
    init_weights(model, seed)
    found, experts = {}, local_experts(model)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
            found[piece.logical_name] = flat[piece.start : piece.start + piece.numel].view(piece.shape)
    return found


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_every_split_of_the_experts_starts_from_the_same_values(ep_size):
    whole = logical(1, 0)
    joined: dict[str, torch.Tensor] = {}
    for rank in range(ep_size):
        for name, values in logical(ep_size, rank).items():
            assert torch.equal(values, whole[name]), name
            joined[name] = values
    assert joined.keys() == whole.keys()


def test_seeds_and_names_give_different_numbers():
    one, other = logical(1, 0, seed=1), logical(1, 0, seed=2)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    name = "layers.1.mlp.experts.{}.gate_up_proj"
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert stable_seed(1, "a") == 5_469_735_371_966_330_324  # the same in every process and version


def test_values_have_the_configured_spread_and_norms_are_one():
    values = logical(1, 0)
    everything = torch.cat([v.flatten() for name, v in values.items() if v.dim() > 1])
    assert everything.std().item() == pytest.approx(TINY.initializer_range, rel=0.02)
    assert abs(everything.mean().item()) < 0.01
    assert all((v == 1).all() for v in values.values() if v.dim() == 1)


def test_bf16_values_are_the_rounded_fp32_ones():
    exact, rounded = logical(1, 0), logical(1, 0, dtype=torch.bfloat16)
    assert all(torch.equal(exact[name].bfloat16(), values) for name, values in rounded.items())


def test_pieces_name_experts_by_their_global_number():
    found = pieces("mtp.0.block.mlp.experts.down_proj", (3, 4, 5), (6, 2, 9))
    assert [piece.logical_name for piece in found] == [f"mtp.0.block.mlp.experts.{e}.down_proj" for e in (6, 2, 9)]
    assert [piece[1:] for piece in found] == [(0, 20, (4, 5)), (20, 20, (4, 5)), (40, 20, (4, 5))]
    (piece,) = pieces("layers.0.mlp.down_proj.weight", (4, 5))
    assert piece == ("layers.0.mlp.down_proj.weight", 0, 20, (4, 5))


def test_stacked_experts_without_their_numbers_are_refused():
    with pytest.raises(ValueError, match=r"down_proj stacks 3 experts, but the numbers of 0 were given"):
        pieces("mtp.0.block.mlp.experts.down_proj", (3, 4, 5))


def test_pieces_cover_each_parameter_once():
    model = Transformer(TINY, LocalExchange(), device="meta")
    experts = local_experts(model)
    for name, parameter in model.named_parameters():
        found = pieces(name, tuple(parameter.shape), experts.get(name, ()))
        assert [piece.start for piece in found] == [sum(p.numel for p in found[:i]) for i in range(len(found))]
        assert all(piece.numel == math.prod(piece.shape) for piece in found)
        assert sum(piece.numel for piece in found) == parameter.numel()


def test_only_stacked_routed_experts_are_expert_parameters():
    model = Transformer(TINY, LocalExchange(), device="meta")
    experts = [name for name, _ in model.named_parameters() if is_expert(name)]
    assert experts == [
        f"{path}.mlp.experts.{leaf}" for path in TINY.moe_layers for leaf in ("gate_up_proj", "down_proj")
    ]
    assert not is_expert("layers.1.mlp.shared_experts.down_proj.weight")
    assert not is_expert("layers.0.mlp.down_proj.weight")


def test_names_are_those_of_the_published_weights():
    names = {name for name, _ in Transformer(TINY, LocalExchange(), device="meta").state_dict().items()}
    attention = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
        f"self_attn.{part}.weight" for part in attention
    }
    dense = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    moe = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    moe |= {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    expected |= {f"layers.0.{part}" for part in layer | dense} | {f"layers.1.{part}" for part in layer | moe}
    expected |= {f"mtp.0.{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "norm")}
    expected |= {f"mtp.0.block.{part}" for part in layer | moe}
    assert names == expected
