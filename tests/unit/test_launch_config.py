"""The configuration: everything wrong is found at once, with the key, the value and a way out."""

import tomllib
from dataclasses import asdict

import pytest

from launch.config import Config, ConfigError, dump, for_debug, layout_problems, preset_names, read, world_size_for


def problems_of(*assignments: str, source: str = "debug") -> list[str]:
    """All problems inside sections of a preset with assignments."""
    problems: list[str] = []
    config = read(source, list(assignments), problems)
    return problems + config.problems()


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_legal_and_survive_a_round_trip(name: str, tmp_path) -> None:
    problems: list[str] = []
    config = read(name, [], problems)
    assert problems + config.problems() == []
    assert layout_problems(config, "ray", config.cluster.workers) == []
    (tmp_path / "again.toml").write_text(dump(config))
    assert read(str(tmp_path / "again.toml"), [], problems) == config
    assert problems == []
    assert set(tomllib.loads(dump(config))) == set(asdict(config))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.stepz=5", "train.stepz is not a known key; did you mean `steps`?"),
        ("optimiser.lr=1", "optimiser is not a known key; did you mean `optimizer`?"),
        ("train.steps=many", 'train.steps = "many" must be an integer, not a text'),
        ("train.steps=1.5", "train.steps = 1.5 must be an integer, not a number"),
        ("parallel.recompute=1", "parallel.recompute = 1 must be true or false, not an integer"),
        ('optimizer.lr="1e-4"', "must be a number, not a text; write it without quotes"),
        (
            "balance.rule=sing",
            'balance.rule = "sing" must be one of "sign", "proportional", "quantile", "aux_loss", "none"; '
            "did you mean 'sign'?",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9] must be a list of 2 values"),
        ("model=3", "model = 3 must be a table"),
        ("train.steps", "'train.steps' is not of the form key.path=value"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4 does not exist; use 0, 1, 2 or 3"),
        ("parallel.chunks=0", "parallel.chunks = 0 must be at least 1"),
        ("parallel.rows_budget=1", "parallel.rows_budget = 1 leaves less than a row for each of parallel.ep_size = 2"),
        ("parallel.ranks_per_node=-1", "parallel.ranks_per_node = -1 must not be negative; 0 asks the launcher"),
        ("parallel.ranks_per_node=3", "parallel.ranks_per_node = 3 cuts groups of parallel.ep_size = 2 into unequal"),
        ("model.num_experts_per_tok=9", "model.num_experts_per_tok = 9 exceeds the 8 experts"),
        ("train.global_batch_size=0", "train.global_batch_size = 0 must be at least 1"),
        ("optimizer.lr=-1", "optimizer.lr = -1.0 must be positive"),
    ],
)
def test_each_mistake_is_named(assignment: str, expected: str) -> None:
    found = problems_of(assignment)
    assert any(expected in problem for problem in found), found


def test_all_mistakes_come_together() -> None:
    found = problems_of("train.stepz=5", "train.steps=many", "parallel.zero_stage=7", "optimizer.lr=0")
    assert len(found) == 4


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["model.n_routed_experts=18", "model.n_group=1", "model.topk_group=1", "parallel.ep_size=4",
          "cluster.workers=4"], "model.n_routed_experts = 18 cannot be split over parallel.ep_size = 4"),
        (["cluster.workers=3", "train.global_batch_size=24"], "cluster.workers = 3 ranks cannot be cut into groups"),
        (["train.global_batch_size=20"], "train.global_batch_size = 20 is not a multiple of"),
        (["cluster.workers=10", "train.global_batch_size=80"], "data.lanes = 192 cannot be dealt to 10 ranks"),
        (["data.seq_len=8192"], "data.seq_len = 8192 is longer than model.max_position_embeddings = 4096"),
        (["parallel.virtual_ranks=2"], "parallel.virtual_ranks = 2 are threads of one process, for --launcher debug"),
        (["train.precision=bf16", "parallel.zero_stage=0"], 'train.precision = "bf16" needs fp32 master weights'),
    ],
)  # fmt: skip
def test_rules_between_sections(assignments: list[str], expected: str) -> None:
    problems: list[str] = []
    config = read("debug", assignments, problems)
    found = layout_problems(config, "ray", config.cluster.workers)
    assert any(expected in problem for problem in found), found


def test_debug_without_virtual_ranks_holds_all_experts() -> None:
    config = read("debug", [], [])
    assert config.parallel.ep_size == 2
    adapted = for_debug(config)
    assert adapted.parallel.ep_size == 1
    assert layout_problems(adapted, "debug", world_size_for(adapted, "debug")) == []
    spread = read("debug", ["parallel.virtual_ranks=2"], [])
    assert for_debug(spread) is spread


def test_a_file_may_start_from_a_preset(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "debug"\n[train]\nsteps = 7\n[model]\nhidden_size = 64\n')
    config = read(str(path), ["train.seed=3"], [])
    base = read("debug", [], [])
    assert (config.train.steps, config.train.seed, config.model.hidden_size) == (7, 3, 64)
    assert config.train.global_batch_size == base.train.global_batch_size
    assert config.model.n_routed_experts == base.model.n_routed_experts


def test_sources_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"neither a preset \(debug, .*\) nor a file"):
        read("debgu", [], [])
    (tmp_path / "broken.toml").write_text("[train\nsteps = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        read(str(tmp_path / "broken.toml"), [], [])


def test_none_travels_through_toml(tmp_path) -> None:
    config = read("debug", ["model.q_lora_rank=none"], [])
    assert config.model.q_lora_rank is None
    (tmp_path / "x.toml").write_text(dump(config))
    assert read(str(tmp_path / "x.toml"), [], []).model.q_lora_rank is None


def test_defaults_are_legal() -> None:
    assert Config().problems() == []
