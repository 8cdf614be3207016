"""What the report says of the balance, in words, alarms and pictures: each finding where it is so, and only there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.alarms import Alarms
from launch.balance_stats import rank_loads
from launch.findings import _period, alarm_table, findings
from launch.history import alarm_spells, read_history, read_pairs, summarize_history
from launch.pictures import marks_of
from launch.report import write_report
from launch.runfolder import RunFolder, read_records
from launch.step_record import StepRecord
from launch.telemetry import Telemetry
from parallel.config import BalanceConfig

CONFIG_TOML = """
[model]
num_hidden_layers = 3
first_k_dense_replace = 1
[parallel]
ep_size = 2
"""
CONFIG = {"model": {"num_hidden_layers": 3, "first_k_dense_replace": 1}}
LAYERS = ["layer 1", "layer 2"]
EVEN = [64] * 8
ALL_DEAD_BUT_TWO = [256, 256, 0, 0, 0, 0, 0, 0]


def open_run(path: Path) -> Telemetry:
    run = RunFolder(path)
    run.create(CONFIG_TOML)
    return Telemetry.open(run, CONFIG, total_steps=40, main=True, console_mode="off")


def log(telemetry: Telemetry, step: int, rows: list[list[int]], **more: Any) -> None:
    figures: dict[str, Any] = {"expert_bias": np.zeros((2, 8), np.float32), **more}
    telemetry.log_step(
        StepRecord(
            step=step, tokens=step * 128, loss=3.0, grad_norm=1.0, lr=1e-3, step_seconds=0.5, tokens_per_second=256.0,
            memory_gib=1.0, data_wait_seconds=0.0, all_to_all_seconds=0.1, world_size=2, ep_size=2,
            tokens_per_expert=np.array(rows), **figures,
        )
    )  # fmt: skip


def said(run: RunFolder) -> str:
    history = read_history(run)
    summary = summarize_history(history)
    spells = alarm_spells(read_records(run.events_path))
    return "\n".join(findings(history, spells, read_pairs(run, summary["last_step"]), summary, LAYERS))


def test_an_even_run_is_told_calmly(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    for step in range(1, 31):
        log(telemetry, step, [EVEN, EVEN])
    text = said(telemetry.run)
    assert "**" not in text  # nothing is marked
    for word in ("alarm", "no token", "saturated", "one direction", "Gate", "waited", "chosen together", "placement"):
        assert word not in text


def test_dead_experts_are_named_by_layer(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    for step in range(1, 31):
        log(telemetry, step, [EVEN, ALL_DEAD_BUT_TWO])
    text = said(telemetry.run)
    assert "**6 experts got no token in the last 3 steps**: layer 2: 2, 3, 4, 5, 6, 7." in text
    floor = np.sqrt(2 * np.log(8) * 8 / 512)
    assert f"The least even is layer 2: max_vio 3.00 in the last 3 steps, {3 / floor:.1f} times" in text
    assert "rank 0 received 2.00 times its share of layer 2" in text and "balance.placement" in text


def test_an_expert_that_gets_tokens_again_is_not_dead(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    for step in range(1, 31):
        log(telemetry, step, [EVEN, EVEN if step == 30 else ALL_DEAD_BUT_TWO])
    assert "no token" not in said(telemetry.run)


def test_ranks_are_told_through_the_placement(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    apart = np.array([list(range(8)), [0, 2, 3, 4, 1, 5, 6, 7]])  # the two experts with tokens on different ranks
    for step in range(1, 4):
        log(telemetry, step, [EVEN, ALL_DEAD_BUT_TWO], placement=apart)
    assert "received 1.00 times its share" in said(telemetry.run)


@pytest.mark.parametrize(("drift", "climbs"), [(1.0, True), (0.0, False)])
def test_a_bias_that_only_climbs_and_one_that_is_too_wide(tmp_path: Path, drift: float, climbs: bool) -> None:
    telemetry = open_run(tmp_path / "run")
    for step in range(1, 41):
        bias = np.zeros((2, 8), np.float32)
        bias[1, 3] = 0.03 * step if drift else 0.03 * (step % 2)
        log(telemetry, step, [EVEN, EVEN], expert_bias=bias)
    text = said(telemetry.run)
    assert (
        "1 bias moved in one direction alone from step 28 on, most that of expert 3 in layer 2 (+0.360)" in text
    ) is (climbs)
    assert ("in one direction" in text) is climbs
    assert ("**The bias is saturated** in layer 2: it spans 1.20" in text) is climbs
    assert ("expert 0 can no longer win against expert 3" in text) is climbs


def test_router_and_ranks_in_words(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    pairs = np.full((2, 8, 8), 100)
    pairs[1, [2, 5], [5, 2]] = 900
    for step in range(1, 11):
        log(telemetry, step, [EVEN, EVEN], changed_by_bias=np.array([51, 307]), gate_entropy=np.array([1.9, 0.5]),
            waiting_seconds=0.08, coactivation=pairs)  # fmt: skip
    text = said(telemetry.run)
    assert "The bias changed 35.0% of the choices in the last steps, most in layer 2 (60.0%); there it decides" in text
    assert "Gate entropy is 1.20 nats of at most ln E = 2.08 in the last steps, lowest in layer 2 (0.50)" in text
    assert "a collapsed router looks like this" in text
    assert "**Ranks waited for the busiest one during 16.0% of the step time, of 20.0% in all-to-all.**" in text
    lift = 900 / ((54 * 100 + 2 * 900) / 56)
    assert f"Experts 2 and 5 of layer 2 are chosen together {lift:.1f} times as often" in text


# --- alarms over the life of a run ---


def run_with_alarms(path: Path) -> Telemetry:
    """Layer 2 is uneven in steps 3 to 9; steps from 6 on are rolled back and done again, evenly from step 8 on."""
    telemetry = open_run(path)
    config = BalanceConfig(alarm_max_vio=0.5, alarm_dead_steps=5, alarm_patience_steps=2, on_max_vio="save")

    def steps(judge: Alarms, first: int, last: int, uneven: range) -> None:
        for step in range(first, last + 1):
            counts = np.array([EVEN, ALL_DEAD_BUT_TWO if step in uneven else EVEN])
            telemetry.alarms(judge.judge(step, counts, rank_loads(counts, 2)))
            log(telemetry, step, counts.tolist())

    judge = Alarms(config, LAYERS, 8)
    steps(judge, 1, 5, range(3, 10))
    state = judge.state()
    steps(judge, 6, 12, range(3, 10))  # experts die at step 7, all ends at step 10
    telemetry.rewind(5, cause="resume from step 5")
    again = Alarms(config, LAYERS, 8)
    again.load_state(state)
    steps(again, 6, 12, range(3, 7))
    return telemetry


def test_alarms_of_steps_that_were_rolled_back_are_forgotten(tmp_path: Path) -> None:
    telemetry = run_with_alarms(tmp_path / "run")
    telemetry.close()
    (spell,) = alarm_spells(read_records(telemetry.run.events_path))
    assert (spell.alarm, spell.layer, spell.expert, spell.action) == ("max_vio", "layer 2", 0, "save")
    assert (spell.since, spell.raised, spell.ended) == (3, 4, 7)
    assert alarm_table([spell])[2] == ("| busiest expert | layer 2 | expert 0 | 3 | 0.5 | 3 to 6; raised at 4 | save |")
    assert "1 alarm raised; all have ended." in said(telemetry.run)


def test_alarms_that_have_not_ended_are_named(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    judge = Alarms(BalanceConfig(alarm_rank_vio=0.5, alarm_dead_steps=0, alarm_patience_steps=1), LAYERS, 8)
    for step in (1, 2):
        counts = np.array([EVEN, ALL_DEAD_BUT_TWO])
        telemetry.alarms(judge.judge(step, counts, rank_loads(counts, 2)))
        log(telemetry, step, counts.tolist())
    assert "1 alarm raised; 1 had not ended at the last step (busiest rank in layer 2 since step 1)." in said(
        telemetry.run
    )
    (row,) = alarm_table(alarm_spells(read_records(telemetry.run.events_path)))[2:]
    assert row == "| busiest rank | layer 2 | rank 0 | 1 | 0.5 | 1 on, not ended; raised at 1 | log |"


def test_dead_experts_end_one_by_one(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    judge = Alarms(BalanceConfig(alarm_dead_steps=1), LAYERS, 8)
    rows = [[256, 256, 0, 0, 0, 0, 0, 0], [256, 0, 256, 0, 0, 0, 0, 0], EVEN]
    for step, row in enumerate(rows, start=1):
        counts = np.array([EVEN, row])
        telemetry.alarms(judge.judge(step, counts, rank_loads(counts, 2)))
    spells = alarm_spells(read_records(telemetry.run.events_path))
    assert [(s.expert, s.raised, s.ended) for s in spells] == [(2, 1, 2), *[(e, 1, 3) for e in range(3, 8)], (1, 2, 3)]


def test_the_plots_mark_all_alarms_and_the_last_events(tmp_path: Path) -> None:
    telemetry = run_with_alarms(tmp_path / "run")
    events = read_records(telemetry.run.events_path)
    marks = marks_of(np.arange(1, 13), events, alarm_spells(events))
    assert marks == [(5, "rewind"), (4, "alarm")]


# --- the report as a whole ---


def test_the_report_draws_what_was_measured(tmp_path: Path) -> None:
    telemetry = run_with_alarms(tmp_path / "run")
    pairs = np.full((2, 8, 8), 100)
    for step in range(13, 16):
        log(telemetry, step, [EVEN, EVEN], changed_by_bias=np.array([51, 307]), gate_entropy=np.array([1.9, 2.0]),
            waiting_seconds=0.08, bytes_sent=3 * 2**20, coactivation=pairs if step == 14 else None)  # fmt: skip
    telemetry.close()
    text = write_report(tmp_path / "run").read_text()
    for name in ("max_vio_layers", "dead", "changed", "entropy", "pairs", "ranks"):
        assert f"(plots/{name}.png)" in text
        assert (tmp_path / "run" / "plots" / f"{name}.png").stat().st_size > 5000
    assert "## Alarms" in text and "| busiest expert | layer 2 | expert 0 |" in text
    assert "- 1 alarm raised; all have ended." in text
    assert "| sent in all-to-all a step, all ranks, median | 3.0 MiB |" in text
    assert "| step time spent waiting for the busiest rank, mean of all ranks | 3.2% |" in text  # 3 of 15 steps


def test_pairs_of_a_step_that_was_rolled_back_are_left_out(tmp_path: Path) -> None:
    telemetry = open_run(tmp_path / "run")
    for step in (1, 2):
        log(telemetry, step, [EVEN, EVEN], coactivation=np.full((2, 8, 8), 9))
    assert read_pairs(telemetry.run, 2) is not None
    assert read_pairs(telemetry.run, 1) is None
    telemetry.run.coactivation.unlink()
    assert read_pairs(telemetry.run, 2) is None


def test_runs_recorded_before_these_figures_have_a_report(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "old")
    run.create(CONFIG_TOML)
    for step in (1, 2, 3):
        run.metrics.append({
            "step": step, "loss": 3.0, "step_seconds": 0.5, "max_vio": 0.5, "max_vio_rank": 0.0, "max_vio_floor": 0.1,
            "max_vio_per_layer": [0.4, 0.6], "tokens_per_expert": [EVEN, EVEN], "expert_bias": None,
        })  # fmt: skip
    text = write_report(tmp_path / "old").read_text()
    assert "max_vio_layers.png" in text and "entropy.png" not in text and "dead.png" not in text


def test_spikes_that_return_have_a_period_and_others_none() -> None:
    steps = np.arange(350)
    returning = np.isin(steps % 24, (18, 22, 23)) & (steps != 70)  # three documents' lanes, one spike missing
    assert _period(returning) == 24
    assert _period(np.isin(steps, (5, 60, 61, 150, 300))) is None
    assert _period(steps % 2 == 0) is None  # not spikes: half of all steps
    assert _period(steps == 3) is None
