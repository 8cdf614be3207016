"""Configuration of the parallel room: layout of ranks, optimizer, balance of experts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over ranks.

    ep_size: ranks that together hold every expert once (must divide the world and the experts).
    zero_stage: DeepSpeed ZeRO stage, 0 to 3; non-expert parameters are sharded over all ranks, experts over theirs.
    dispatch: how tokens travel; all are exact and dropless. `all_to_all`: a row for each choice of an expert. `dedup`:
        a row for each rank that a token goes to, weighted and added up there. `two_hop`: one for each node over the
        slow network, then one for each rank inside it; the same as dedup where an expert-parallel group is on one node.
    ranks_per_node: neighbouring ranks that share a node, for two_hop; 0: what the launcher says.
    payload: how rows are written on the wire: `auto` as they are computed, `fp32`, `bf16`, or `fp8`: tokens as
        float8_e4m3fn with a scale a row, results and gradients in bf16.
    chunks: runs of tokens whose transfers hide behind each other's work.
    rows_budget: the most rows that may come to a rank at once, 0 for any. Where routing brings more, the tokens go in
        as many runs as keep to it, one at a time, and the backward sends and computes each again: the same result,
        slower.
    virtual_ranks: ranks played by threads of one process, in the debug launcher only (1 = none).
    recompute: rerun each decoder layer in the backward pass instead of keeping its activations.
    timeout_s: how long a collective may wait for its slowest rank before the run is declared hung.
    """

    ep_size: int = 1
    zero_stage: int = 1
    dispatch: Literal["all_to_all", "dedup", "two_hop"] = "dedup"
    ranks_per_node: int = 0
    payload: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    chunks: int = 1
    rows_budget: int = 0
    virtual_ranks: int = 1
    recompute: bool = False
    timeout_s: float = 600.0

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.ep_size < 1:
            found.append(f"parallel.ep_size = {self.ep_size} must be at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            found.append(f"parallel.zero_stage = {self.zero_stage} does not exist; use 0, 1, 2 or 3")
        if self.virtual_ranks < 1:
            found.append(f"parallel.virtual_ranks = {self.virtual_ranks} must be at least 1")
        if self.ranks_per_node < 0:
            found.append(f"parallel.ranks_per_node = {self.ranks_per_node} must not be negative; 0 asks the launcher")
        if self.ranks_per_node > 0 and self.ep_size % self.ranks_per_node and self.ranks_per_node % self.ep_size:
            found.append(
                f"parallel.ranks_per_node = {self.ranks_per_node} cuts groups of parallel.ep_size = {self.ep_size} "
                f"into unequal parts; use a divisor or a multiple of {self.ep_size}"
            )
        if self.chunks < 1:
            found.append(f"parallel.chunks = {self.chunks} must be at least 1")
        if self.rows_budget and self.rows_budget < self.ep_size:
            found.append(
                f"parallel.rows_budget = {self.rows_budget} leaves less than a row for each of parallel.ep_size = "
                f"{self.ep_size} ranks; use 0 (no limit) or at least {max(1, self.ep_size)}"
            )
        if self.timeout_s <= 0:
            found.append(f"parallel.timeout_s = {self.timeout_s} must be positive (seconds)")
        return found


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    schedule: after `warmup_steps` of linear warm-up, `constant`; `cosine` down to `min_lr_ratio * lr` at the last step;
    or `wsd` (warm-up, stable, decay): constant, then linear to `min_lr_ratio * lr` over the last `decay_fraction`.
    grad_clip: largest global gradient norm; 0 switches clipping off.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_steps: int = 20
    decay_fraction: float = 0.3
    min_lr_ratio: float = 0.1

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.lr <= 0:
            found.append(f"optimizer.lr = {self.lr} must be positive")
        if self.weight_decay < 0:
            found.append(f"optimizer.weight_decay = {self.weight_decay} must not be negative")
        if any(not 0 <= beta < 1 for beta in self.betas):
            found.append(f"optimizer.betas = {list(self.betas)} must both lie in [0, 1)")
        if self.eps <= 0:
            found.append(f"optimizer.eps = {self.eps} must be positive")
        if self.grad_clip < 0:
            found.append(f"optimizer.grad_clip = {self.grad_clip} must not be negative; 0 switches clipping off")
        if self.warmup_steps < 0:
            found.append(f"optimizer.warmup_steps = {self.warmup_steps} must not be negative")
        if not 0 <= self.decay_fraction <= 1:
            found.append(f"optimizer.decay_fraction = {self.decay_fraction} must lie in [0, 1]")
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(f"optimizer.min_lr_ratio = {self.min_lr_ratio} must lie in [0, 1]")
        return found


@dataclass(frozen=True)
class BalanceConfig:
    """How the routing bias is moved.

    rule: `sign` moves each expert's bias by `rate` towards the mean load once per optimizer step; `none` leaves it.
    seq_aux_loss_coef: weight of the sequence-wise balance loss (DeepSeek-V3 uses 1e-4; 0 switches it off).
    """

    rule: Literal["sign", "none"] = "sign"
    rate: float = 1e-3
    seq_aux_loss_coef: float = 1e-4

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.rate < 0:
            found.append(f"balance.rate = {self.rate} must not be negative; 0 freezes the bias")
        if self.seq_aux_loss_coef < 0:
            found.append(
                f"balance.seq_aux_loss_coef = {self.seq_aux_loss_coef} must not be negative; 0 switches it off"
            )
        return found
