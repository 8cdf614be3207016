"""Configuration of the parallel room: layout of ranks, optimizer, balance of experts."""

from dataclasses import dataclass
from typing import Annotated, Literal


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
    timeout_s: seconds that a collective may wait for its slowest rank before the run is declared hung.
    """

    ep_size: Annotated[int, "[1, 100000]"] = 1
    zero_stage: Annotated[int, "[0, 3]"] = 1
    dispatch: Literal["all_to_all", "dedup", "two_hop"] = "dedup"
    ranks_per_node: Annotated[int, "[0, 100000]"] = 0
    payload: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    chunks: Annotated[int, "[1, 1000]"] = 1
    rows_budget: Annotated[int, "[0, 1e12]"] = 0
    virtual_ranks: Annotated[int, "[1, 1024]"] = 1
    recompute: bool = False
    timeout_s: Annotated[float, "[0.001, 1e7]"] = 600.0

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

    lr: the highest learning rate, after the warm-up.
    weight_decay: AdamW's decoupled decay; each step takes lr * weight_decay of a weight away.
    betas: decay of AdamW's first and second moment.
    eps: what AdamW adds to the root of the second moment.
    grad_clip: largest global gradient norm; 0 switches clipping off.
    schedule: after the warm-up `constant`; `cosine` down to `min_lr_ratio * lr` at the last step; or `wsd` (warm-up,
        stable, decay): constant, then linear to `min_lr_ratio * lr` over the last `decay_fraction` of the steps.
    warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
    decay_fraction: share of the steps at the end over which `wsd` falls.
    min_lr_ratio: the learning rate at the last step, as a share of lr, under `cosine` and `wsd`.
    """

    lr: Annotated[float, "[1e-20, 1000]"] = 1e-3
    weight_decay: Annotated[float, "[0, 1000]"] = 0.1
    betas: Annotated[tuple[float, float], "[0, 1)"] = (0.9, 0.95)
    eps: Annotated[float, "[1e-20, 1]"] = 1e-8
    grad_clip: Annotated[float, "0 or [1e-12, 1e12]"] = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_steps: Annotated[int, "[0, 1e9]"] = 20
    decay_fraction: Annotated[float, "[0, 1]"] = 0.3
    min_lr_ratio: Annotated[float, "[0, 1]"] = 0.1

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.lr <= 0:
            found.append(f"optimizer.lr = {self.lr} must be positive")
        if self.weight_decay < 0:
            found.append(f"optimizer.weight_decay = {self.weight_decay} must not be negative")
        if self.lr * self.weight_decay >= 1:
            found.append(
                f"optimizer.weight_decay = {self.weight_decay} times optimizer.lr = {self.lr} is 1 or more: a step "
                "would take more away than a weight has; lower one of them"
            )
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


Action = Literal["log", "raise_rate", "save", "stop"]
DEFAULT_RATES = {"sign": 1e-3, "proportional": 1e-2, "quantile": 1.0}


@dataclass(frozen=True)
class BalanceConfig:
    """How experts, and the ranks that hold them, are kept in balance.

    rule: what moves the routing bias once per optimizer step (parallel/balance_rules.py names the papers): `sign` by
        `rate` towards the mean load; `proportional` by `rate` times the relative shortfall; `quantile` by the fraction
        `rate` of the way to the bias at which each expert's share would have been exact. `aux_loss` leaves the bias at
        zero and adds a balance loss over the global batch; `none` does neither.
    rate: see rule; None is the rule's own: 0.001, 0.01 and 1.
    rate_warmup_steps: optimizer steps over which the rate rises linearly to its full value.
    rate_schedule: how the rate then falls: `constant` does not; `step` drops to zero at `rate_zero_at` (DeepSeek-V3);
        `linear` and `cosine` fall from `rate_anneal_from` to zero at `rate_zero_at`; all counted in optimizer steps.
    rate_anneal_from: the optimizer step at which `linear` and `cosine` begin to fall.
    rate_zero_at: the optimizer step from which on the rate is zero.
    recentre: subtract each layer's mean from its bias after every move; no choice depends on it.
    aux_loss_coef: weight of the `aux_loss` rule's loss, summed over layers.
    seq_aux_loss_coef: weight of the sequence-wise balance loss (DeepSeek-V3 uses 1e-4; 0 switches it off), any rule.
    check_every_steps: how often all ranks compare their biases; 0 is never.
    placement: `fixed` leaves expert e on rank e // (E / ep_size); `load` deals them out anew whenever a checkpoint is
        saved, if that would lower the busiest rank's measured load by `placement_min_gain` of the mean load.
    placement_min_gain: see placement.
    alarm_max_vio: a layer's max_vio beyond which an alarm is raised; 0 switches the alarm off, as below. An alarm is
        raised once, and again only after it has ended.
    on_max_vio, on_dead_expert, on_rank_vio: what the alarm does beside its event: nothing (`log`), raise the rate by
        `raise_rate_factor` for `raise_rate_steps` steps, save a checkpoint, or save one and stop.
    alarm_dead_steps: an expert's steps without a token beyond which an alarm is raised.
    alarm_rank_vio: a layer's max_vio over ranks beyond which an alarm is raised.
    alarm_patience_steps: steps in a row for which max_vio, of experts or ranks, must stay beyond its limit.
    raise_rate_factor: what `raise_rate` multiplies the rate by.
    raise_rate_steps: optimizer steps for which `raise_rate` holds.
    """

    rule: Literal["sign", "proportional", "quantile", "aux_loss", "none"] = "sign"
    rate: Annotated[float | None, "[0, 1000]"] = None
    rate_warmup_steps: Annotated[int, "[0, 1e9]"] = 0
    rate_schedule: Literal["constant", "step", "linear", "cosine"] = "constant"
    rate_anneal_from: Annotated[int, "[0, 1e9]"] = 0
    rate_zero_at: Annotated[int, "[0, 1e9]"] = 0
    recentre: bool = False
    aux_loss_coef: Annotated[float, "[0, 1000]"] = 1e-2
    seq_aux_loss_coef: Annotated[float, "[0, 1000]"] = 1e-4
    check_every_steps: Annotated[int, "[0, 1e9]"] = 100
    placement: Literal["fixed", "load"] = "fixed"
    placement_min_gain: Annotated[float, "[0, 1e6]"] = 0.05
    alarm_max_vio: Annotated[float, "[0, 1e6]"] = 0.0
    on_max_vio: Action = "log"
    alarm_dead_steps: Annotated[int, "[0, 1e9]"] = 100
    on_dead_expert: Action = "log"
    alarm_rank_vio: Annotated[float, "[0, 1e6]"] = 0.0
    on_rank_vio: Action = "log"
    alarm_patience_steps: Annotated[int, "[1, 1e9]"] = 20
    raise_rate_factor: Annotated[float, "[1, 1e6]"] = 10.0
    raise_rate_steps: Annotated[int, "[1, 1e9]"] = 100

    @property
    def full_rate(self) -> float:
        """The rate before any schedule; 0 under rules that leave the bias alone."""
        if not self.moves_bias:
            return 0.0
        return DEFAULT_RATES[self.rule] if self.rate is None else self.rate

    @property
    def moves_bias(self) -> bool:
        """Whether the rule moves the bias at all."""
        return self.rule in DEFAULT_RATES

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        if self.rate is not None and self.rate < 0:
            found.append(f"balance.rate = {self.rate} must not be negative; 0 freezes the bias")
        if self.rule == "quantile" and self.full_rate > 1:
            found.append(f"balance.rate = {self.rate} is a fraction of the way under rule quantile; use at most 1")
        for key in ("aux_loss_coef", "seq_aux_loss_coef", "alarm_max_vio", "alarm_rank_vio"):
            if getattr(self, key) < 0:
                found.append(f"balance.{key} = {getattr(self, key)} must not be negative; 0 switches it off")
        for key in ("rate_warmup_steps", "check_every_steps", "alarm_dead_steps", "rate_anneal_from"):
            if getattr(self, key) < 0:
                found.append(f"balance.{key} = {getattr(self, key)} must not be negative")
        for key in ("alarm_patience_steps", "raise_rate_steps"):
            if getattr(self, key) < 1:
                found.append(f"balance.{key} = {getattr(self, key)} must be at least 1")
        if self.placement_min_gain < 0:
            found.append(f"balance.placement_min_gain = {self.placement_min_gain} must not be negative")
        if self.raise_rate_factor < 1:
            found.append(f"balance.raise_rate_factor = {self.raise_rate_factor} must be at least 1")
        return found + self._schedule_problems() + self._action_problems()

    def _schedule_problems(self) -> list[str]:
        if self.rate_schedule == "constant":
            unused = [key for key in ("rate_anneal_from", "rate_zero_at") if getattr(self, key)]
            return [f"balance.{key} = {getattr(self, key)} means nothing under rate_schedule constant; "
                    "use step, linear or cosine" for key in unused]  # fmt: skip
        start = self.rate_warmup_steps if self.rate_schedule == "step" else self.rate_anneal_from
        if self.rate_zero_at <= start or self.rate_zero_at <= self.rate_warmup_steps:
            return [
                f"balance.rate_zero_at = {self.rate_zero_at} must come after "
                f"rate_warmup_steps = {self.rate_warmup_steps} and rate_anneal_from = {self.rate_anneal_from} "
                f"under rate_schedule {self.rate_schedule}"
            ]
        if self.rate_schedule != "step" and self.rate_anneal_from < self.rate_warmup_steps:
            return [
                f"balance.rate_anneal_from = {self.rate_anneal_from} lies inside the warm-up; use at least "
                f"rate_warmup_steps = {self.rate_warmup_steps}"
            ]
        return []

    def _action_problems(self) -> list[str]:
        if self.rule in ("sign", "proportional"):
            return []
        return [
            f'balance.{key} = "raise_rate" has no rate to raise under rule {self.rule}; use log, save or stop'
            for key in ("on_max_vio", "on_dead_expert", "on_rank_vio")
            if getattr(self, key) == "raise_rate"
        ]
