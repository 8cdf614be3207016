"""`trimtab bench moe` and `bench step`: tables from what ranks said, what is left out, and one small run of ours."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import bench_moe, bench_step
from launch.bench_moe_layers import LayerShape, draw_weights
from launch.bench_moe_rank import ROUTINGS, draw_tokens, loads, plain_layer
from launch.bench_step_ways import WAYS, StepShape, even_choice
from launch.cli import main
from model.count import count_parameters
from model.router import choose_experts

SMALL = LayerShape(batch=2, seq_len=16, hidden=16, width=8, experts=8, top_k=2)
SIZES = ["--batch", "2", "--seq-len", "16", "--hidden", "16", "--width", "8", "--experts", "8", "--top-k", "2"]
MACHINE = {"processor": "a processor", "cores": 2, "load": 0.5, "packages": {"torch": "2.13.0", "transformers": None}}


def _said(seconds: float, error: float = 1e-7, exposed: float | None = None) -> list[dict[str, Any]]:
    """One repeat of one way, as bench_moe_rank.measure returns it; even routing takes half the time."""
    return [
        {"routing": routing, "seconds": took, "forward": took / 3, "backward": took * 2 / 3, "exposed": exposed,
         "peak_mib": 10.0 * took, "output_error": error, "gradient_error": error / 2, "busiest_over_mean": 1.5}
        for routing, took in zip(ROUTINGS, (seconds, seconds / 2), strict=True)
    ]  # fmt: skip


def test_rows_hold_the_spread_over_repeats_and_compare_with_ours() -> None:
    found = {
        (2, "trimtab"): [_said(0.2, exposed=0.02), _said(0.1, exposed=0.01), _said(0.3, exposed=0.03)],
        (2, "slow"): [_said(0.6), _said(0.4), _said(0.5, error=0.25)],
        (1, "slow"): [_said(0.6)],
    }
    rows = {(row["ranks"], row["routing"], row["way"]): row for row in bench_moe.table_rows(found)}
    assert len(rows) == 6
    ours, slow = rows[2, "natural", "trimtab"], rows[2, "natural", "slow"]
    assert (ours["seconds"].median, ours["seconds"].least, ours["seconds"].greatest) == (0.2, 0.1, 0.3)
    assert ours["exposed"].median == 0.02 and slow["exposed"] is None
    assert ours["peak_mib"] == pytest.approx(3.0)
    assert slow["of_ours"] == pytest.approx(2.5) and rows[2, "even", "slow"]["of_ours"] == pytest.approx(2.5)
    assert rows[1, "natural", "slow"]["of_ours"] is None
    assert slow["output_error"] == 0.25  # the worst of the repeats
    facts = {**asdict(SMALL), "repeats": 3, "runs_each": 5, "machine": MACHINE, "absent": {"gone": "left out: why"}}
    text = bench_moe.render(list(rows.values()), facts)
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("slow") and " 500.0 " in line).endswith("WRONG")
    assert not next(line for line in lines if line.startswith("trimtab")).endswith("WRONG")
    assert lines[-1] == "gone: left out: why"


def test_a_peer_that_is_not_installed_is_named() -> None:
    present, absent = bench_moe.installed(["ours", "theirs"], {"ours": ("torch",), "theirs": ("torch", "no-such-one")})
    assert present == ["ours"]
    assert absent == {"theirs": "left out: not installed (pip install no-such-one)"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["moe", "--only", "trimtab;magic"], "there is no way 'magic'; use trimtab; transformers eager"),
        (["step", "--only", "magic"], "there is no way 'magic'; use trimtab; trimtab, ep 1"),
        (["moe", "--ranks", "3"], "--ranks 3: 16 experts cannot be dealt to so many"),
        (["moe", "--hidden", "8"], "--hidden 8 must be at least --experts 16"),
        (["step", "--ranks", "3"], "model.n_routed_experts = 16 cannot be split over parallel.ep_size = 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_tokens_are_drawn_for_the_routing_that_is_wanted() -> None:
    gate = draw_weights(SMALL)["gate"]
    even = loads(SMALL, gate, draw_tokens(SMALL, gate, 0, "even"))
    natural = loads(SMALL, gate, draw_tokens(SMALL, gate, 0, "natural"))
    assert even.tolist() == [8] * 8
    assert natural.sum() == 64 and natural.max() > 12


def test_the_plain_layer_is_what_one_token_says() -> None:
    weights = {name: value.double() for name, value in draw_weights(SMALL).items()}
    x = draw_tokens(SMALL, draw_weights(SMALL)["gate"], 0, "natural")
    token = x.view(-1, SMALL.hidden)[5].double()
    scores = (weights["gate"] @ token).sigmoid()
    best = scores.topk(2)

    def swiglu(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return down @ (torch.nn.functional.silu(gate @ token) * (up @ token))

    wanted = swiglu(weights["shared_gate"], weights["shared_up"], weights["shared_down"])
    for score, expert in zip(best.values, best.indices, strict=True):
        gate, up = weights["gate_up"][expert].chunk(2)
        wanted = wanted + 2.5 * score / best.values.sum() * swiglu(gate, up, weights["down"][expert])
    found = plain_layer(SMALL, draw_weights(SMALL), x, softmax=False).view(-1, SMALL.hidden)[5]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_forced_choices_are_even_and_obeyed() -> None:
    model = StepShape(experts=8, top_k=2).model()
    chosen = choose_experts(torch.rand(24, 8), even_choice(24, 8, 2), model)
    assert torch.bincount(chosen.flatten(), minlength=8).tolist() == [6] * 8


def test_the_step_benchmark_has_about_eight_million_parameters() -> None:
    assert 7.5e6 < count_parameters(StepShape().model()).total < 8.5e6


def _trained(seconds: float, first: float, exposed: list[float] | None = None) -> dict[str, Any]:
    """One repeat of one way, as bench_step_rank.measure returns it."""
    return {
        "routings": [
            {"routing": routing, "losses": [first, first - 1], "seconds": [seconds, 2 * seconds],
             "exposed": exposed or []}
            for routing in ROUTINGS
        ],
        "peak_mib": 5.0, "profile": None,
    }  # fmt: skip


def test_step_rows_compare_speed_and_first_losses() -> None:
    found = {"trimtab": [_trained(0.5, 7.0, [0.1, 0.2])], "slow": [_trained(1.0, 7.0), _trained(2.0, 7.0)]}
    rows = bench_step.table_rows(found, n_tokens=100)
    natural = {row["way"]: row for row in rows if row["routing"] == "natural"}
    assert natural["trimtab"]["tokens_per_second"].median == 150.0
    assert natural["slow"]["tokens_per_second"].repeats == 4
    assert natural["slow"]["ours_over_it"] == pytest.approx(150 / 50)
    assert natural["trimtab"]["exposed"].median == pytest.approx(0.15) and natural["slow"]["exposed"] is None
    assert natural["slow"]["last_loss"] == 6.0
    said = bench_step.verdicts(rows)
    assert said[0] == "all ways start with the same loss, 7.000000"
    assert "natural routing: trimtab has 3.00 times the tokens/s of slow" in said
    found["slow"][0]["routings"][0]["losses"][0] = 7.001
    assert "do NOT start with the same loss" in bench_step.verdicts(bench_step.table_rows(found, 100))[0]


def test_peers_as_launched_stand_beside_ours_as_launched() -> None:
    found = {"trimtab": [_trained(0.5, 7.0)], "transformers eager": [_trained(0.25, 7.0)],
             "trimtab as launched": [_trained(1.0, 7.0)], "eager as launched": [_trained(2.0, 7.0)]}  # fmt: skip
    rows = bench_step.table_rows(found, n_tokens=100)
    ratio = {row["way"]: row["ours_over_it"] for row in rows if row["routing"] == "even"}
    assert ratio == pytest.approx({"trimtab": 1, "trimtab as launched": 1, "transformers eager": 0.5,
                                   "eager as launched": 2})  # fmt: skip
    machine = {"processor": "a processor", "cores": 2, "load": 0.0, "packages": {}}
    facts = {**asdict(StepShape()), "ranks": 2, "repeats": 1, "steps": 2, "parameters": 8e6, "threads_per_rank": 1,
             "machine": machine, "verdicts": [], "absent": {}, "profile": None}  # fmt: skip
    lines = bench_step.render(rows, facts).splitlines()
    headings = [number for number, line in enumerate(lines) if " routing, " in line]
    assert [lines[number].split(",")[0] for number in headings] == ["natural routing", "even routing"] * 2
    for place, number in enumerate(headings):
        ways = [line[:26].strip() for line in lines[number + 1 : number + 3]]
        expected = [["transformers eager", "trimtab"], ["trimtab as launched", "eager as launched"]][place // 2]
        assert ways == expected, "the fastest first"


def test_threads_are_those_said_or_those_of_the_launcher() -> None:
    assert {name: way.threads(3, 10**6) for name, way in WAYS.items() if way.as_launched} == {
        "trimtab as launched": 1, "AutoEP as launched": None, "AutoEP, loop, as launched": None,
        "eager as launched": None, "grouped_mm as launched": None,
    }  # fmt: skip
    assert all(way.threads(3, 2) == 3 for way in WAYS.values() if not way.as_launched)


def test_ours_alone_runs_and_is_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["bench", "moe", "--ranks", "1", "--only", "trimtab", "--repeats", "1", "--inner", "2", *SIZES]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "moe.json").read_text())
    assert [row["routing"] for row in record["rows"]] == list(ROUTINGS)
    for row in record["rows"]:
        assert row["output_error"] < 1e-5 and row["gradient_error"] < 1e-5
        assert row["seconds"]["median"] > 0 and row["exposed"] is None
    assert (tmp_path / "moe.csv").exists() and (tmp_path / "moe.png").stat().st_size > 1000
