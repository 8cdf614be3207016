"""Every key of the configuration with every kind of value: refused by name, or the resolved run can be built."""

import dataclasses
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.plan import Plan
from launch import bounds
from launch.config import Config, ConfigError, dump, read
from launch.preflight import checked_config
from launch.schema import places, show
from model.config import YarnConfig
from model.count import count_parameters
from model.exchange import LocalExchange
from model.transformer import Transformer
from parallel.layout import Layout
from parallel.schedule import balance_rate, learning_rate
from tests.unit.data_samples import pack_small

PRESET = read("debug", [], [])
KEYS = sorted(key for keys in places(Config).values() for key in keys)
RANGES = {
    f"{section}.{key}": text
    for section, field in Config.__dataclass_fields__.items()
    for key, text in bounds.ranges(field.default_factory).items()  # type: ignore[misc]
} | {f"model.rope_scaling.{key}": text for key, text in bounds.ranges(YarnConfig).items()}
NUMBERS = [
    "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "-0.5", "0.5", "1e-320", "1e-30", "1e30", "1e308", "1e400",
    "9" * 30, "9" * 5000, "-" + "9" * 30, "2147483648", "9223372036854775808",
]  # fmt: skip
OTHERS = [
    "", "none", "null", "abc", "true", "false", "[]", "[1]", "[1,2]", "[nan,nan]", "[[0,1]]", "{}", "{a=1}", '"1"',
    "'0.5'", "\x00", '"\\u0000"', "a\nb", "5 # five", "\udcff", "x" * 9000, "2024-01-01", "::", "pipe:cat", "s3://",
    "cpu", "load", "sign", "bf16", "../..", "kill@rank=1,seconds=nan", "slow@seconds=inf,times=-1",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(pack_small(tmp_path_factory.mktemp("values")))


def outcome(assignments: list[str]) -> tuple[Config | None, list[str]]:
    """The configuration that would run in one process, or the problems."""
    problems: list[str] = []
    try:
        config, _, _ = checked_config("debug", assignments, "debug", problems, [], None)
    except ConfigError as error:
        return None, error.problems
    return (None, problems) if problems else (config, [])


def can_be_built(config: Config, dataset: Dataset) -> None:
    """What a start does with the numbers, as far as it is cheap: any exception is a failure of the check before it."""
    steps = config.train.steps
    for step in {0, 1, steps // 2, steps - 1, steps}:
        rate = learning_rate(config.optimizer, step, steps)
        assert 0 <= rate <= config.optimizer.lr * (1 + 1e-9) and math.isfinite(rate)
        assert 0 <= balance_rate(config.balance, step) < math.inf
    assert torch.tensor(config.optimizer.eps) > 0 and torch.tensor(config.model.rms_norm_eps) > 0
    assert timedelta(seconds=config.parallel.timeout_s) > timedelta(0)
    world_size = config.parallel.virtual_ranks
    assert sum(map(len, Layout(world_size, config.parallel.ep_size, 0).ep_groups())) == world_size
    assert config.accumulation_steps(world_size) >= 1
    count = count_parameters(config.model)
    assert 0 < count.active <= count.total
    few_layers = config.model.num_hidden_layers + config.model.num_nextn_predict_layers < 8
    if config.model != PRESET.model and few_layers and count.total < 1e10:
        with torch.device("meta"):
            model = Transformer(config.model, LocalExchange())
        assert sum(weight.numel() for weight in model.parameters()) == count.total
    if config.data.mode == "indexed" and config.data.lanes * config.data.seq_len < 1e7:
        try:
            Plan.of(dataset, config.data)
        except DataError as error:
            assert "data." in str(error)


def survives_toml(config: Config, tmp_path: Path) -> None:
    """What is printed or written to the run's folder reads back as the same."""
    written = tmp_path / "again.toml"
    written.write_text(dump(config), encoding="utf-8")
    problems: list[str] = []
    assert read(str(written), [], problems) == config and not problems


def check(key: str, text: str, dataset: Dataset) -> None:
    config, problems = outcome([f"{key}={text}"])
    if config is None:
        last = key.rpartition(".")[2]
        assert any(last in problem for problem in problems), (key, text[:60], problems)
        assert all(len(problem) < 2000 for problem in problems)
        str(ConfigError(problems)).encode()  # can be printed anywhere
    else:
        can_be_built(config, dataset)


@pytest.mark.parametrize("section", sorted(Config.__dataclass_fields__))
def test_awkward_values_of_every_key(section: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.preflight.secret_problems", lambda tables: [])  # a third of the time; tested by itself
    for key in KEYS:
        if key.startswith(f"{section}."):
            edges = [
                edge
                for part in bounds.parts(RANGES.get(key, "0"))
                for edge in (part.low, part.high, part.low - 1, part.high + 1, part.high * 1.01, part.low / 2)
            ]
            for text in (*NUMBERS, *OTHERS, *(show(edge) for edge in edges), *(show(int(edge)) for edge in edges)):
                check(key, text, dataset)


VALUES = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-5, 5000), st.floats(), st.floats(0, 2), st.booleans(),
    st.text(max_size=9),
    st.lists(st.one_of(st.floats(), st.integers(-3, 3), st.text(max_size=3)), max_size=4),
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_values_of_random_keys(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]
) -> None:
    config, problems = outcome([f"{key}={show(value)}" for key, value in changes])
    if config is None:
        assert any(key.rpartition(".")[2] in problem for key, _ in changes for problem in problems), problems
        str(ConfigError(problems)).encode()
    else:
        can_be_built(config, dataset)
        survives_toml(config, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_outside_their_range_are_refused_and_defaults_are_inside(key: str) -> None:
    section, _, last = key.rpartition(".")
    cls = YarnConfig if section == "model.rope_scaling" else type(getattr(Config(), section))
    field = cls.__dataclass_fields__[last]
    assert bounds.wrong(key, field.default, RANGES[key]) is None
    for wrong in (math.nan, math.inf, -math.inf, -1.0, 1e300):
        assert bounds.wrong(key, wrong, RANGES[key]), wrong


def test_every_number_has_a_range() -> None:
    for section in dataclasses.fields(Config):
        cls = type(getattr(Config(), section.name))
        for field in dataclasses.fields(cls):
            kind = str(field.type)
            if ("int" in kind or "float" in kind) and "Literal" not in kind:
                assert f"{section.name}.{field.name}" in RANGES


def test_a_refused_key_does_not_break_other_rules() -> None:
    for bad in ("cluster.workers=many", "cluster.workers=nan", "cluster.workers=99999999999"):
        problems: list[str] = []
        checked_config("v3-671b", [bad], "ray", problems, [], None)
        assert len(problems) == 1 and problems[0].startswith("cluster.workers = "), problems


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.steps=abc", 'train.steps = "abc" must be an integer, not a text'),
        ("lr=1e-3", "lr is not a known key; did you mean `optimizer.lr`?"),
        ("train.lr=1e-3", "train.lr is not a known key; did you mean `optimizer.lr`?"),
        ("seed=1", "did you mean `data.seed` or `train.seed`?"),
        ("parallel.tp_size=2", "Trimtab has no tensor parallelism"),
        ("parallel.pipeline_parallel_size=2", "Trimtab has no pipeline parallelism"),
        ("parallel.context_parallel_size=2", "Trimtab has no context or sequence parallelism"),
        ("optimizer.name=muon", "AdamW is the only optimizer"),
        ("train.precision=fp8", "Trimtab does not train in FP8"),
        ("balance.rate=null", "write none"),
        ("data.path=2024", "'data.path=\"2024\"'"),
        ("train.steps=5\nbalance.rule=none", "must be an integer, not a text"),
        ("train.steps=" + "9" * 5000, "train.steps"),
        ("optimizer.lr=nan", "optimizer.lr = nan is not a finite number"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas = [0.9, nan] is not a finite number"),
    ],
)
def test_what_to_do_instead_is_said(assignment: str, expected: str) -> None:
    _, problems = outcome([assignment])
    assert any(expected in problem for problem in problems), problems


def test_numbers_that_were_not_quoted_are_not_said_to_be() -> None:
    assert "quotes" not in " ".join(outcome(["train.steps=abc"])[1])


def test_a_table_of_the_command_line_keeps_the_other_keys() -> None:
    config, _ = outcome(["optimizer={lr=0.5}"])
    assert config is not None and config.optimizer.lr == 0.5
    assert config.optimizer.warmup_steps == read("debug", [], []).optimizer.warmup_steps


def test_files_that_lead_in_a_circle(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'preset = "{two}"\n')
    two.write_text(f'preset = "{one}"\n')
    with pytest.raises(ConfigError, match="leads back to this file"):
        read(str(one), [], [])
    one.write_text("preset = 3\n")
    with pytest.raises(ConfigError, match="preset = 3 must be the name"):
        read(str(one), [], [])
    one.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read(str(one), [], [])


@pytest.mark.parametrize(
    ("problem", "heading"),
    [
        ("train.steps = 0 must be at least 1", "one problem with the configuration"),
        ("--seed -1 is negative", "one problem with the command's options"),
        ("/tmp/x is not a run: it has no config.toml", "one problem with the run's folder"),
        ("/tmp/x has no manifest.json", "one problem with the input"),
    ],
)
def test_a_problem_is_called_by_its_kind(problem: str, heading: str) -> None:
    assert str(ConfigError([problem])).startswith(heading)
