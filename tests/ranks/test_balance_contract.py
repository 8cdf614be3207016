"""The exactness contract of balance, over random layouts: the same choices give the same bias, bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from launch.runfolder import RunFolder
from launch.session import Session
from parallel.balance import BiasMismatchError
from parallel.config import BalanceConfig
from parallel.layout import divisors
from parallel.ranks import virtual_ranks
from parallel.threads import run_virtual_ranks
from tests.end_to_end.conftest import events
from tests.ranks import contract
from tests.ranks.contract import ALONE, SEQUENCES, Layout, Scenario, Step, play
from tests.ranks.contract_oracle import check_same, check_steps
from tests.ranks.spawn import run_ranks
from tests.ranks.training import NearTies

LAYOUTS = [
    Layout(world, ep_size, micro_batch_size, recompute)
    for world in (4, 2, 1)
    for ep_size in divisors(world)[::-1]
    for micro_batch_size in divisors(SEQUENCES // world)
    for recompute in (True, False)
]
RATES = {"sign": 0.02, "proportional": 0.05, "quantile": 0.6}
STEPS = 4


@st.composite
def balances(draw: st.DrawFn, rule: str) -> BalanceConfig:
    """A rule with a schedule, centring, and an alarm that raises the rate where the rule allows it."""
    settings: dict[str, Any] = {"rule": rule, "rate": RATES.get(rule), "check_every_steps": draw(st.integers(1, 3))}
    settings |= {"placement": draw(st.sampled_from(["load", "fixed"])), "placement_min_gain": 0.0}
    if rule in RATES:
        name = draw(st.sampled_from(["cosine", "linear", "step", "constant"]))
        settings |= {"rate_schedule": name, "recentre": draw(st.booleans())}
        settings["rate_warmup_steps"] = draw(st.integers(0, 2))
        if name != "constant":
            settings |= {"rate_anneal_from": 2, "rate_zero_at": draw(st.sampled_from([3, 9]))}
    if rule in ("sign", "proportional") and draw(st.booleans()):
        settings |= {"alarm_max_vio": 0.5, "on_max_vio": "raise_rate", "alarm_patience_steps": 2}
        settings |= {"raise_rate_factor": 2.5, "raise_rate_steps": 2}
    balance = BalanceConfig(**settings)
    assert not balance.problems()
    return balance


@st.composite
def scenarios(draw: st.DrawFn, rule: str) -> Scenario:
    """A run through one or two layouts, with whatever must not leave a trace."""
    first, second = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))
    cut = draw(st.sampled_from([2, 3, STEPS]))
    return Scenario(
        balance=draw(balances(rule)),
        segments=((first, STEPS),) if cut == STEPS else ((first, cut), (second, STEPS)),
        skips=draw(st.frozensets(st.integers(0, STEPS - 1), max_size=2)),
        interludes=draw(st.frozensets(st.integers(0, STEPS - 1), max_size=1)),
        grouped=draw(st.booleans()),
        mtp=draw(st.integers(0, 1)),
        padded=draw(st.booleans()),
    )


EXAMPLES = {"sign": 4, "quantile": 4, "proportional": 3, "aux_loss": 2, "none": 1}


@pytest.mark.parametrize("rule", EXAMPLES)
def test_the_same_choices_give_the_same_bias_at_any_layout(
    contract_data: Path, tmp_path_factory: pytest.TempPathFactory, rule: str
) -> None:
    @given(scenarios(rule))
    @settings(
        max_examples=EXAMPLES[rule], deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def keeps_the_contract(scenario: Scenario) -> None:
        folder = tmp_path_factory.mktemp("contract")
        steps = play(scenario, contract_data, folder / "run")
        check_steps(scenario, contract_data, steps)
        check_same(steps, play(scenario.alone(), contract_data, folder / "alone"), scenario)

    keeps_the_contract()


def test_the_scripted_routing_is_worth_a_test(contract_data: Path, tmp_path: Path) -> None:
    """A favourite beyond what bf16 counts exactly, and a bias that changes choices."""
    scenario = Scenario(BalanceConfig(rule="quantile", rate=1.0))
    steps = play(scenario, contract_data, tmp_path / "run")
    assert max(steps[0].counts[0]) > 256
    assert max(steps[-1].counts[0]) < 0.4 * max(steps[0].counts[0])
    assert min(min(row) for row in steps[0].counts) < 8, "and an expert with hardly a token"


# -- choices of a model that learns -----------------------------------------------------------------------------------

TRAINED = {
    "quantile": BalanceConfig(rule="quantile", rate=0.5),
    "proportional": BalanceConfig(rule="proportional", rate=0.05, recentre=True),
    "aux_loss": BalanceConfig(rule="aux_loss", aux_loss_coef=0.1),
}


def train_alone(balance: BalanceConfig, data: Path, folder: Path, padded: bool = False) -> tuple[list[Step], list[int]]:
    """One rank's steps, everything trained, and the near-ties of each."""
    found: list[int] = []

    def watch(session: Session) -> None:
        near_ties, log = NearTies(session.model), session.telemetry.log_step

        def logged(record: Any) -> None:
            found.append(near_ties.reset())
            log(record)

        session.telemetry.log_step = logged  # type: ignore[method-assign]

    steps = play(Scenario(balance, ((ALONE, 3),), padded=padded, scripted=False), data, folder, watch)
    return steps, found


def check_trained(found: list[Step], reference: list[Step], near_ties: list[int], where: str) -> None:
    """Losses within rounding; counts and biases equal until a near-tie.

    Under `quantile` the bias is made from scores, not from choices alone: a need that rounding carries into the next
    bin moves it by up to a bin's width, and from there on the runs may part.
    """
    for mine, other, ties in zip(found, reference, near_ties, strict=True):
        assert math.isclose(mine.loss, other.loss, rel_tol=2e-6), f"loss of step {mine.step}, {where}"
        assert math.isclose(mine.norm, other.norm, rel_tol=1e-4), f"norm of step {mine.step}, {where}"
        if mine.counts != other.counts:
            assert ties, f"step {mine.step}, {where}: a choice flipped that was not a near-tie"
            return
        if mine.bias != other.bias:
            off = (torch.tensor(mine.bias) - torch.tensor(other.bias)).abs().max()
            assert where.startswith("quantile") and off < 5e-3, f"the bias of step {mine.step} is {off} off, {where}"
            return


@pytest.mark.parametrize("rule", TRAINED)
def test_a_model_that_learns_chooses_and_loses_alike(contract_data: Path, tmp_path: Path, rule: str) -> None:
    reference, near_ties = train_alone(TRAINED[rule], contract_data, tmp_path / "alone", padded=True)
    assert reference[-1].loss < reference[0].loss
    for layout in (Layout(1, 1, 2, recompute=True), Layout(2, 2, 1, recompute=False), Layout(4, 2, 2, recompute=True)):
        scenario = Scenario(TRAINED[rule], ((layout, 3),), padded=True, scripted=False)
        found = play(scenario, contract_data, tmp_path / f"{layout.world}")
        check_trained(found, reference, near_ties, f"{rule}, {layout}")


@pytest.mark.slow
def test_real_processes_under_zero_keep_the_contract(contract_data: Path, tmp_path: Path) -> None:
    """Stages 1 to 3, ep 2, accumulation 2, recompute; `quantile` scripted and resumed, `aux_loss` trained."""
    names = list(contract.PROCESS_SCENARIOS)
    payload = {
        "scenarios": names, "data": str(contract_data), "folders": [str(tmp_path / name) for name in names],
    }  # fmt: skip
    by_rank = run_ranks(2, "tests.ranks.contract:play_processes", payload)
    assert repr(by_rank[0]) == repr(by_rank[1])
    aux_loss, near_ties = train_alone(TRAINED["aux_loss"], contract_data, tmp_path / "alone")
    for name, raw in zip(names, by_rank[0], strict=True):
        steps, scenario = [Step(*step) for step in raw], contract.PROCESS_SCENARIOS[name]
        if scenario.scripted:
            check_steps(scenario, contract_data, steps)
            check_same(steps, play(scenario.alone(), contract_data, tmp_path / f"{name}, alone"), scenario)
        else:
            check_trained(steps, aux_loss[: len(steps)], near_ties[: len(steps)], name)


# -- the check while training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_a_rank_with_another_bias_stops_all_ranks(contract_data: Path, tmp_path: Path, every: int) -> None:
    """Rank 2's bias is a little off from step 1 on; the next check names it, on every rank."""
    scenario = Scenario(BalanceConfig(rate=0.01, check_every_steps=every), ((Layout(4, 2, 2), 6),), mtp=0)
    trained: list[int] = []

    def damage(session: Session) -> None:
        read = session.stream.read

        def reading(step: int) -> Any:
            trained.append(step)
            if step == 1 and session.ranks.dp.rank == 2:
                session.balancer.biases[0][7] += 1e-6
            return read(step)

        session.stream.read = reading  # type: ignore[method-assign]

    said: dict[int, str] = {}

    def work(world: Any, rank: int) -> None:
        with pytest.raises(BiasMismatchError, match=r"ranks \[2\]") as error:
            ranks = virtual_ranks(world, 2, rank)
            contract.segment(scenario, 0, contract_data, tmp_path / "run", ranks, hook=damage)
        said[rank] = str(error.value)

    RunFolder(tmp_path / "run").create("")
    with contract.prepared(scenario):
        run_virtual_ranks(4, work)
    assert len(said) == 4 and len(set(said.values())) == 1
    assert max(trained) == 1, "no step after the check that found it"


def test_experts_that_move_between_ranks_change_nothing(contract_data: Path, tmp_path: Path) -> None:
    balance = BalanceConfig(rate=0.02, placement="load", placement_min_gain=0.0)
    scenario = Scenario(balance, ((Layout(4, 4, 2), 3), (Layout(2, 2, 2, recompute=True), STEPS)))
    steps = play(scenario, contract_data, tmp_path / "run")
    moved = [event["experts_moved"] for event in events(tmp_path / "run") if event["kind"] == "placement"]
    assert moved and min(moved) > 0
    check_steps(scenario, contract_data, steps)
    check_same(steps, play(scenario.alone(), contract_data, tmp_path / "alone"), scenario)
