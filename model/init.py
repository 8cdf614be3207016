"""Initial values that do not depend on the layout: every logical tensor is drawn from its own generator."""

from __future__ import annotations

import hashlib

import torch

from model.naming import pieces
from model.slots import local_experts
from model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill all parameters and buffers.

    Matrices are normal with standard deviation `initializer_range`, normalisation weights 1, the balancing bias 0.
    Numbers are drawn in fp32 on the CPU and then cast and moved, so that every device, dtype and expert split gets the
    same ones.

    Args:
        model: on any device but meta; whole parameters (before an engine shards them).
        seed: any integer.
    """
    std = model.config.initializer_range
    experts = local_experts(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
            generator = torch.Generator().manual_seed(stable_seed(seed, piece.logical_name))
            values = torch.empty(piece.numel).normal_(0.0, std, generator=generator)
            flat[piece.start : piece.start + piece.numel] = values.to(parameter.device, parameter.dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():  # the balancing bias; where experts lie is not for this function to say
            buffer.zero_()


def stable_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one name, the same in every process and Python version (unlike hash())."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
