"""Rotary angles and the softmax scale, with YaRN."""

# S seq, d rotary width

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig, YarnConfig


def rotary_tables(config: ModelConfig, seq_len: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. seq_len - 1.

    Returns:
        cos, sin: (S, d/2) fp32 each, multiplied by YaRN's magnitude where it is not 1.
    """
    frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float32, device=device)
    angles = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * frequencies  # (S, d/2)
    cos, sin = angles.cos(), angles.sin()
    magnitude = 1.0 if config.rope_scaling is None else yarn_magnitude(config.rope_scaling)
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of each pair, fastest first; d/2 of them.

    With YaRN a frequency that turns more than beta_fast times in the original context is kept, one that turns less
    than beta_slow times is divided by the factor, and a linear ramp over the pair's index blends between them.

    Source: Peng et al. 2023, arXiv 2309.00071, section 3.2; ramp limits rounded outwards as DeepSeek does.
    """
    width, base = config.qk_rope_head_dim, config.rope_theta
    plain = [base ** (-2 * i / width) for i in range(width // 2)]
    yarn = config.rope_scaling
    if yarn is None:
        return plain

    def pair_with_turns(turns: float) -> float:
        """Index (fractional) of the pair that turns so many times within the original context."""
        return width * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(yarn.beta_slow)), width - 1)
    span = max(high - low, 0.001)  # equal limits make a step
    blended = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - low) / span, 0.0), 1.0)
        blended.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return blended


def yarn_magnitude(yarn: YarnConfig) -> float:
    """YaRN's factor on cosines and sines, DeepSeek's form."""
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on query-key products: 1/sqrt(head width), times YaRN's temperature squared."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
