"""What `trimtab bench balance` compares: one small model under every rule, a dense twin, fewer experts a token.

Every training differs from the base in the named keys only; the seed is that of the weights and of the data order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launch.config import Config, ConfigError, from_tables
from launch.schema import override
from model.config import ModelConfig
from model.count import count_parameters

Rule = Literal["sign", "proportional", "quantile", "aux_loss", "none"]
RULES: tuple[Rule, ...] = ("sign", "proportional", "quantile", "aux_loss", "none")
OTHERS = WEAK, DENSE, TOP2 = "aux_loss-0.001", "dense", "top-2"
EP_SIZE = 4  # ranks over which the loads are counted for the rank figures; nothing is sent
TWIN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Setting:
    """One rule's numbers: its rate and how it falls, or the weight of its loss.

    anneal_from, zero_at: when the rate begins to fall and reaches zero, as fractions of the training (BalanceConfig).
    """

    rate: float | None = None
    schedule: Literal["constant", "step", "linear", "cosine"] = "constant"
    anneal_from: float = 0.0
    zero_at: float = 1.0
    aux_loss_coef: float | None = None

    def table(self, rule: Rule, steps: int) -> dict[str, Any]:
        """The `balance` section of a training of so many steps."""
        found: dict[str, Any] = {"rule": rule}
        if self.rate is not None:
            found["rate"] = self.rate
        if self.aux_loss_coef is not None:
            found["aux_loss_coef"] = self.aux_loss_coef
        if self.schedule != "constant":
            found["rate_schedule"] = self.schedule
            found["rate_zero_at"] = max(1, round(self.zero_at * steps))
            if self.schedule != "step":
                found["rate_anneal_from"] = min(round(self.anneal_from * steps), found["rate_zero_at"] - 1)
        return found

    def __str__(self) -> str:
        if self.aux_loss_coef is not None:
            return f"coefficient {self.aux_loss_coef:g}"
        if self.rate is None:
            return "no rate"
        if self.schedule == "constant":
            return f"rate {self.rate:g}"
        start = "" if self.schedule == "step" else f" from {self.anneal_from:.0%}"
        return f"rate {self.rate:g}, {self.schedule}{start} to 0 at {self.zero_at:.0%}"


# The best of SEARCH by held-out max_vio; the losses of all tries lay within 0.02 nats of each other.
SETTINGS: Mapping[Rule, Setting] = {
    "sign": Setting(0.01, "linear", 0.5),
    "proportional": Setting(0.03, "linear", 0.5),
    "quantile": Setting(0.3, "linear", 0.5),
    "aux_loss": Setting(aux_loss_coef=0.3),
    "none": Setting(),
}
LITERATURE = Setting(aux_loss_coef=0.001)  # the coefficient that arXiv 2408.15664 compares with, of the arm WEAK
# The same number of tries for every rule that has something to choose; `--search` runs them.
SEARCH: Mapping[Rule, Sequence[Setting]] = {
    "sign": (
        Setting(0.01), Setting(0.01, "linear"), Setting(0.01, "linear", 0.5), Setting(0.003, "linear", 0.5),
    ),
    "proportional": (
        Setting(0.01), Setting(0.1, "linear"), Setting(0.03, "linear", 0.5), Setting(0.01, "linear", 0.5),
    ),
    "quantile": (Setting(1.0), Setting(1.0, "linear"), Setting(0.3, "linear", 0.5), Setting(0.1, "linear", 0.5)),
    "aux_loss": tuple(Setting(aux_loss_coef=weight) for weight in (0.01, 0.03, 0.1, 0.3)),
}  # fmt: skip
SEARCH_HELDOUT_EVERY = 3


@dataclass(frozen=True)
class Training:
    """One training: what it is called, its seed, its whole configuration, and how the arm was set.

    heldout_every: n, where every n-th held-out document is evaluated.
    """

    arm: str
    seed: int
    config: Config
    setting: str
    heldout_every: int = 1

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-seed{self.seed}"


def base_tables(data: str, steps: int) -> dict[str, Any]:
    """The model, data and optimizer that all trainings share: 1.6 million parameters, 1.0 of them active."""
    return {
        "model": {
            "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 3, "num_nextn_predict_layers": 0,
            "num_attention_heads": 4, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
            "v_head_dim": 32, "max_position_embeddings": 256, "intermediate_size": 320, "moe_intermediate_size": 64,
            "first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
            "n_group": 1, "topk_group": 1, "initializer_range": 0.05,
        },
        "data": {"path": data, "seq_len": 256},
        "optimizer": {
            "lr": 3e-3, "warmup_steps": min(30, steps), "schedule": "cosine", "min_lr_ratio": 0.02,
        },
        "train": {"steps": steps, "global_batch_size": 8, "micro_batch_size": 8},
        "checkpoint": {"every_steps": 200, "keep": 1},
        "telemetry": {"console": "off", "heatmap_every_steps": 1_000_000},
    }  # fmt: skip


def make_config(data: str, steps: int, assignments: Sequence[str], balance: dict[str, Any], seed: int) -> Config:
    """The base with the user's assignments, one rule and one seed.

    Raises:
        ConfigError: everything that is wrong with the assignments.
    """
    tables = base_tables(data, steps)
    for assignment in assignments:
        try:
            override(tables, assignment)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
    tables["balance"] = {**tables.get("balance", {}), **balance}
    tables["train"]["seed"] = tables["data"]["seed"] = seed
    config = from_tables(tables)
    if problems := config.problems():
        raise ConfigError(problems)
    return config


def trainings(
    data: str,
    steps: int,
    rules: Sequence[Rule],
    others: Sequence[str],
    seeds: Sequence[int],
    assignments: Sequence[str] = (),
) -> list[Training]:
    """All trainings, seed by seed, so that a busy hour of the machine does not fall on one arm alone.

    The dense twin has no rule; `top-2` has that of the first of `rules`.
    """
    found = []
    for seed in seeds:
        for rule in rules:
            setting = SETTINGS[rule]
            config = make_config(data, steps, assignments, setting.table(rule, steps), seed)
            found.append(Training(rule, seed, config, str(setting)))
        if WEAK in others:
            config = make_config(data, steps, assignments, LITERATURE.table("aux_loss", steps), seed)
            found.append(Training(WEAK, seed, config, str(LITERATURE)))
        if DENSE in others:
            config = make_config(data, steps, assignments, {"rule": "none"}, seed)
            found.append(Training(DENSE, seed, replace(config, model=dense_twin(config.model)), "no experts"))
        if TOP2 in others:
            setting = SETTINGS[rules[0]]
            config = make_config(data, steps, assignments, setting.table(rules[0], steps), seed)
            fewer = replace(config, model=replace(config.model, num_experts_per_tok=2))
            found.append(Training(TOP2, seed, fewer, f"{rules[0]}, {setting}"))
    return found


def search_trainings(
    data: str, steps: int, rules: Sequence[Rule], seed: int, assignments: Sequence[str] = ()
) -> list[Training]:
    """Every setting that the search tries, under one seed that the measurement does not use."""
    found = []
    for rule in rules:
        for number, setting in enumerate(SEARCH.get(rule, ())):
            config = make_config(data, steps, assignments, setting.table(rule, steps), seed)
            found.append(Training(f"{rule}-{number + 1}", seed, config, str(setting), SEARCH_HELDOUT_EVERY))
    return found


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same model with dense feed-forwards only, as wide as it takes for the same active parameters.

    Raises:
        ConfigError: no width comes within 1 %, or the model has prediction modules, which always have experts.
    """
    if model.num_nextn_predict_layers:
        raise ConfigError(
            [
                f"model.num_nextn_predict_layers = {model.num_nextn_predict_layers}: prediction modules have experts, "
                "so that there is no dense twin; use 0, or leave out the dense model"
            ]
        )
    wanted = count_parameters(model).active
    twin = replace(model, first_k_dense_replace=model.num_hidden_layers, intermediate_size=1)
    narrowest = count_parameters(twin).active
    per_unit = 3 * model.hidden_size * model.num_hidden_layers
    twin = replace(twin, intermediate_size=max(1, 1 + round((wanted - narrowest) / per_unit)))
    found = count_parameters(twin).active
    if abs(found - wanted) > TWIN_TOLERANCE * wanted:
        raise ConfigError(
            [
                f"no dense model has the {wanted:,} active parameters of this one: intermediate_size = "
                f"{twin.intermediate_size} gives {found:,}; use a larger model, or leave out the dense model"
            ]
        )
    return twin
