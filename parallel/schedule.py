"""Learning rate and bias rate by step, and parameter groups: pure functions."""

import math

from torch import nn

from parallel.config import BalanceConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up from lr / warmup_steps, then the chosen schedule; see `OptimizerConfig`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        decay_steps = max(1, round(total_steps * config.decay_fraction))
        remaining = total_steps - step
        return config.lr if remaining >= decay_steps else floor + (config.lr - floor) * remaining / decay_steps
    return config.lr


def rate_jump(
    before: tuple[OptimizerConfig, int], now: tuple[OptimizerConfig, int], step: int
) -> tuple[float, float] | None:
    """The rates of the last step of a run and of the next one, where they differ by more than the
    schedule's own step there.

    Args:
        before, now: the settings and the steps in all, as the run was saved with and as it goes on with.
        step: optimizer steps done.

    Returns:
        (rate of the last step, rate of the next one); None where the schedule goes on as it would anyway.
    """
    if step < 1:
        return None
    last, following = learning_rate(*_at(before, step - 1)), learning_rate(*_at(now, step))
    own = abs(following - learning_rate(*_at(now, step - 1)))
    return (last, following) if abs(following - last) > own * (1 + 1e-6) + 1e-12 * max(last, following) else None


def _at(settings: tuple[OptimizerConfig, int], step: int) -> tuple[OptimizerConfig, int, int]:
    """The arguments of `learning_rate`; behind a schedule's end it stays where it ended."""
    config, total = settings
    return config, min(step, max(0, total)), total


def balance_rate(config: BalanceConfig, step: int) -> float:
    """The bias rate of optimizer step `step` (0-based); see `BalanceConfig`.

    DeepSeek-V3 (arXiv 2412.19437), section 4.2, keeps it constant and drops it to zero for the last part of training.
    """
    if config.rate_schedule != "constant" and step >= config.rate_zero_at:
        return 0.0
    if step < config.rate_warmup_steps:
        return config.full_rate * (step + 1) / config.rate_warmup_steps
    if config.rate_schedule in ("constant", "step") or step < config.rate_anneal_from:
        return config.full_rate
    progress = (step - config.rate_anneal_from) / (config.rate_zero_at - config.rate_anneal_from)
    if config.rate_schedule == "linear":
        return config.full_rate * (1.0 - progress)
    return config.full_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to the vectors of norms.

    `ds_shape` is a parameter's whole shape where ZeRO stage 3 has already cut it up.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
