"""Where experts lie changes nothing that the model computes: values, gradients and statistics, bit for bit."""

import pytest
import torch

from model.exchange import LocalExchange
from model.init import init_weights
from model.naming import pieces
from model.slots import local_experts, place, placement
from model.transformer import Transformer
from tests.unit.literal_model import TINY, batch

E = TINY.n_routed_experts


def shuffled(seed: int = 0) -> torch.Tensor:
    """(M, E): another order for every layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=generator) for _ in TINY.moe_layers])


def build(table: torch.Tensor | None) -> Transformer:
    """A model whose experts lie as the table says before they get their values, with biases that are not zero."""
    model = Transformer(TINY, LocalExchange())
    if table is not None:
        place(model, table)
    init_weights(model, 3)
    for path in TINY.moe_layers:
        model.get_submodule(path).mlp.gate.e_score_correction_bias.copy_(torch.arange(E) / 20)
    return model


def results(model: Transformer) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and statistics; gradients by logical name."""
    tokens, targets = batch(TINY, 3, 12)
    output = model(tokens, None, targets)
    (output.token_losses.mean() + output.mtp_token_losses[0].mean() + output.routing.sequence_balance).backward()
    gradients, experts = {}, local_experts(model)
    for name, parameter in model.named_parameters():
        for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
            gradients[piece.logical_name] = parameter.grad.view(-1)[piece.start : piece.start + piece.numel]
    return [output.token_losses, *output.mtp_token_losses, *output.routing], gradients


def test_no_result_depends_on_where_experts_lie() -> None:
    plain, moved = results(build(None)), results(build(shuffled()))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], moved[0], strict=True))
    assert plain[1].keys() == moved[1].keys()
    assert all(torch.equal(plain[1][name], moved[1][name]) for name in plain[1])


def test_the_table_is_what_was_placed_and_follows_the_module() -> None:
    model = Transformer(TINY, LocalExchange())
    order = torch.arange(E).expand(len(TINY.moe_layers), E)
    assert torch.equal(placement(model), order)
    names = model.state_dict().keys()
    place(model, shuffled())
    assert torch.equal(placement(model), shuffled())
    assert model.state_dict().keys() == names, "where experts lie is not part of the weights"
    assert model.to("meta").layers[1].mlp.slot_of_expert.device.type == "meta"
    place(model, order)
    assert model.layers[1].mlp.slot_of_expert is None, "in order, no token's experts are looked up"


def test_a_rank_names_its_own_slots() -> None:
    exchange = LocalExchange()
    exchange.ep_size, exchange.ep_rank = 4, 2
    model = Transformer(TINY, exchange)
    assert local_experts(model)["layers.1.mlp.experts.down_proj"] == (4, 5)
    place(model, shuffled())
    assert local_experts(model) == {
        f"{path}.mlp.experts.{leaf}": tuple(row[4:6])
        for path, row in zip(TINY.moe_layers, shuffled().tolist(), strict=True)
        for leaf in ("gate_up_proj", "down_proj")
    }


def test_a_row_that_does_not_hold_every_expert_once_is_refused() -> None:
    model = Transformer(TINY, LocalExchange())
    with pytest.raises(ValueError, match="must hold each of 8 experts once"):
        place(model, torch.zeros(len(TINY.moe_layers), E, dtype=torch.int64))
