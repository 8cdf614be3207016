"""The arithmetic of `trimtab bench scaling`: parts that add up, the network's fit, which runs, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench_scaling_parts import (
    FIELDS,
    PARTS,
    efficiency,
    fit_network,
    loss_difference,
    lost_to,
    measured,
    split_step,
)
from launch.bench_scaling_plan import Layout, Run, batch_of, oversubscribed, runs
from launch.bench_scaling_rank import even_choice
from launch.bench_scaling_table import network_rows, parity_sentence, render, rows_of
from launch.cli import main
from model.config import ModelConfig


def rank_step(calls: dict[str, list[float]] | None = None, **seconds: float) -> dict[str, Any]:
    """One rank's step; what is not named took no time. Unless given, each kind of collective was one call."""
    found: dict[str, Any] = dict.fromkeys(FIELDS, 0.0) | seconds
    zero = found["zero_in_model"] + found["zero_in_update"]
    found["calls"] = calls or {"all_to_all": [found["all_to_all"]], "zero": [zero], "other": [found["other"]]}
    return found


BUSY = rank_step(
    data=0.01, model=0.60, all_to_all=0.05, zero_in_model=0.04, update=0.10, zero_in_update=0.03, other=0.02
)
IDLE = rank_step(
    data=0.03, model=0.60, all_to_all=0.25, zero_in_model=0.10, update=0.10, zero_in_update=0.05, other=0.01
)


def test_the_parts_of_a_step_are_prices_and_waits_and_add_up() -> None:
    parts = split_step([1.0], [[BUSY], [IDLE]], 2)
    assert parts == pytest.approx(
        {
            "compute": (0.51 + 0.25) / 2, "optimizer": (0.07 + 0.05) / 2, "ZeRO": 0.07, "all-to-all": 0.05,
            "waiting": (0.20 + 0.08 + 0.01) / 2, "data": 0.02, "rest": 1.0 - 0.38 - 0.06 - 0.07 - 0.05 - 0.145 - 0.02,
        }
    )  # fmt: skip
    assert sum(parts.values()) == pytest.approx(1.0) and tuple(parts) == PARTS


def test_the_rank_that_comes_last_is_found_in_every_step() -> None:
    """Summed over both steps the ranks waited alike; they waited for each other nevertheless."""
    one, other = rank_step(all_to_all=0.1), rank_step(all_to_all=0.5)
    parts = split_step([1.0, 1.0], [[one, other], [other, one]], 2)
    assert (parts["all-to-all"], parts["waiting"]) == (pytest.approx(0.1), pytest.approx(0.2))


def test_the_rank_that_comes_last_is_found_in_every_call_of_its_group() -> None:
    """Ranks that wait for each other in turns, layer by layer, spend the same in a step; that is no price of bytes."""

    def turns(*calls: float) -> dict[str, Any]:
        return rank_step({"all_to_all": list(calls), "zero": [], "other": []}, all_to_all=sum(calls))

    one, other = turns(0.1, 0.5), turns(0.4, 0.1)
    parts = split_step([1.0], [[one], [other]], 2)
    assert (parts["all-to-all"], parts["waiting"]) == (pytest.approx(0.2), pytest.approx(0.35))
    slow = turns(0.7, 0.7)  # another group of ranks: nobody in it waits
    parts = split_step([1.0], [[one], [other], [slow], [slow]], 2)
    assert (parts["all-to-all"], parts["waiting"]) == (pytest.approx((0.2 + 1.4) / 2), pytest.approx(0.35 / 2))
    with pytest.raises(ValueError, match="ranks 0 to 1 made different numbers of all_to_all calls"):
        split_step([1.0], [[one], [turns(0.1)]], 2)


def result(run: Run, seconds: float = 1.0, tokens: int = 100, steps: int = 4, **changes: Any) -> dict[str, Any]:
    """A run's result with made-up figures: the step takes `seconds`, but ten times as long in the first."""
    metrics = [
        {"step": n + 1, "loss": 8.0 - n, "tokens": tokens * (n + 1), "step_seconds": seconds * (10 if n == 0 else 1),
         "bytes_sent": 2**20 * run.size}
        for n in range(steps)
    ]  # fmt: skip
    share = rank_step(model=0.5 * seconds, update=0.25 * seconds)
    ranks = [[share] * steps for _ in range(run.size)]
    sweep = [[1e-4 + nbytes / 1e9] * 3 for nbytes in SIZES] if run.size > 1 else []
    return {
        "name": run.name,
        "ep_size": 1,
        "metrics": metrics,
        "ranks": ranks,
        "sweep": sweep,
        "collectives_timed": True,
        **changes,
    }


SIZES = [4096, 65536, 2**20]


def test_what_is_lost_adds_up_to_what_is_missing_from_the_efficiency() -> None:
    base = measured(result(Run(1, 4, "natural", 0), seconds=1.0), 1)
    here = measured(result(Run(4, 4, "natural", 0), seconds=0.4), 1)
    assert (base.tokens_per_second, base.seconds, base.mib_sent) == (100.0, 1.0, 1.0)  # not the first step's
    assert here.tokens_per_second == pytest.approx(250) and efficiency(here, base) == pytest.approx(250 / 100 / 4)
    lost = lost_to(here, base)
    assert sum(lost.values()) == pytest.approx(1 - efficiency(here, base)) and tuple(lost) == PARTS
    assert lost["compute"] == pytest.approx((4 * 0.2 - 0.5) / 1.6)
    assert lost["data"] == 0 and sum(lost_to(base, base).values()) == 0 and efficiency(base, base) == 1
    twice = measured(result(Run(2, 8, "natural", 0), seconds=1.25, tokens=200), 1)  # weak scaling
    assert efficiency(twice, base) == pytest.approx(0.8) and sum(lost_to(twice, base).values()) == pytest.approx(0.2)


def test_metrics_and_ranks_of_different_lengths_are_not_compared() -> None:
    one = result(Run(2, 4, "even", 0))
    one["ranks"][1] = one["ranks"][1][:-1]
    with pytest.raises(ValueError, match=r"4 steps in the metrics, \[4, 3\] on the ranks"):
        measured(one, 1)
    with pytest.raises(ValueError, match="4 steps in the metrics"):
        measured(result(Run(2, 4, "even", 0)), 4)


def test_the_fit_finds_latency_and_bandwidth_and_says_how_far_off_it_is() -> None:
    nbytes = [4**power for power in range(6, 12)]
    fit = fit_network(nbytes, [50e-6 + size / 2e9 for size in nbytes])
    assert fit.latency_s == pytest.approx(50e-6) and fit.gigabytes_per_second == pytest.approx(2.0)
    assert max(map(abs, fit.residuals)) < 1e-9
    slow = [50e-6 + size / 2e9 * (1.5 if size == nbytes[-1] else 1) for size in nbytes]
    off = fit_network(nbytes, slow)
    assert off.residuals[-1] > 0.05 and off.seconds_per_byte > fit.seconds_per_byte
    # errors count relative to the time: an absolute one would leave the smallest message with no say
    assert off.latency_s == pytest.approx(50e-6, rel=0.1)
    with pytest.raises(ValueError, match="two sizes"):
        fit_network([8, 8], [1.0, 1.0])


def test_losses_are_compared_step_by_step_and_nan_is_no_agreement() -> None:
    assert loss_difference([8.0, 4.0], [8.0, 4.0]) == 0
    assert loss_difference([8.0, 4.1], [8.0, 4.0]) == pytest.approx(0.025)
    assert loss_difference([8.0, float("nan")], [8.0, 4.0]) == float("inf")
    with pytest.raises(ValueError, match="1 and 2 steps"):
        loss_difference([8.0], [8.0, 4.0])


def test_sizes_take_turns_and_the_base_of_both_modes_is_one_run() -> None:
    found = runs([1, 2, 4], ["strong", "weak"], ["natural", "even"], 1, 8, repeats=2)
    assert len(found) == len(set(found)) == 2 * 2 * 5
    once = [(run.size, run.batch) for run in found[:10:2]]
    assert once == [(1, 8), (2, 8), (2, 16), (4, 8), (4, 32)]
    assert [(run.size, run.batch, run.routing) for run in found[10:]] == [
        (run.size, run.batch, run.routing) for run in found[9::-1]
    ]
    assert len({run.name for run in found}) == len(found)
    assert {run.batch for run in runs([2, 4], ["weak"], ["even"], 4, 8, 1)} == {4, 8}
    with pytest.raises(ValueError, match="--global-batch 2 at --base 4 is not a whole number of sequences at 3 ranks"):
        batch_of("weak", 3, 4, 2)


def test_experts_are_spread_as_far_as_a_size_allows_and_too_many_processes_are_said() -> None:
    layout = Layout("debug", (), "local", 4, 2, 1, 0, 12)
    assert [layout.ep_at(size) for size in (1, 2, 3, 4, 6, 8)] == [1, 2, 1, 4, 2, 4]
    assert oversubscribed(layout, 2, 2) == "" and oversubscribed(layout, 4, 2).startswith(
        "4 processes on 2 cores: over"
    )
    nodes = Layout("debug", (), "ray", 4, 2, 1, 2, 12)
    assert [nodes.nodes_at(size) for size in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"), [(16, 4, 4, 2), (16, 4, 1, 1), (64, 6, 8, 3), (8, 2, 2, 1), (12, 5, 3, 2)]
)
def test_forced_routing_is_even_inside_the_groups_and_the_same_for_every_sequence(
    experts: int, top_k: int, groups: int, kept: int
) -> None:
    config = ModelConfig(n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups, topk_group=kept)
    ids = even_choice(6 * experts, 3 * experts, config)
    assert torch.equal(ids[: 3 * experts], ids[3 * experts :])
    odd = experts + 1  # what a prediction module sees
    assert torch.equal(*even_choice(2 * odd, odd, config).split(odd))
    assert torch.equal(torch.bincount(ids.flatten(), minlength=experts), torch.full((experts,), 6 * top_k))
    for token in ids.tolist():
        assert len(set(token)) == top_k
        assert len({expert // (experts // groups) for expert in token}) == min(kept, top_k)


def canned(**changes: Any) -> dict[Run, dict[str, Any]]:
    """Sizes 1 and 2, three repeats, of which the second is in the middle."""
    found = {}
    for size, batch, seconds in ((1, 4, 1.0), (2, 4, 0.7), (2, 8, 1.3)):
        for repeat, slower in enumerate((1.2, 1.0, 0.9)):
            run = Run(size, batch, "natural", repeat)
            found[run] = result(run, seconds * slower, tokens=25 * batch, **changes)
    return found


def facts(results: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    agree, sentence = parity_sentence(results, 1, 4)
    where = {"processor": "abacus", "cores": 2, "load": 0.1, "memory_gib": 1, "python": "3", "packages": {"torch": "2"}}
    return dict.fromkeys(
        ("preset", "hidden_size", "experts", "top_k", "seq_len", "micro_batch", "zero_stage", "dispatch", "launcher",
         "steps", "warm_up", "repeats"), 3
    ) | {"threads": 1, "machine": where, "collectives_timed": True, "losses_agree": agree, "loss_parity": sentence,
         "network": network_rows(results, SIZES)}  # fmt: skip


def test_rows_hold_the_run_in_the_middle_and_the_spread_of_pairs() -> None:
    results = canned()
    rows = rows_of(results, ["strong", "weak"], ["natural"], [2, 1], 1, list(results), 1)
    assert [(row["mode"], row["ranks"], row["sequences"]) for row in rows] == [
        ("strong", 1, 4), ("strong", 2, 4), ("weak", 1, 4), ("weak", 2, 8)
    ]  # fmt: skip
    strong, weak = rows[1], rows[3]
    assert strong["run"] == "2-ranks-4-sequences-natural-2" and strong["base"] == "1-ranks-4-sequences-natural-2"
    rate = strong["tokens_per_second"]
    assert (rate.median, rate.least, rate.repeats) == (pytest.approx(100 / 0.7), pytest.approx(100 / 0.84), 3)
    share = strong["efficiency"]  # each repeat beside its own base: the machine's mood cancels
    assert [share.median, share.least, share.greatest] == pytest.approx([1 / 1.4] * 3)
    assert weak["efficiency"].median == pytest.approx(1 / 1.3) and weak["loss_difference"] is None
    for row in rows:
        assert sum(row["lost"].values()) == pytest.approx(1 - row["efficiency"].median)
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
    even = {run: one for run, one in results.items() if run.repeat < 2}  # of two, the slower
    assert rows_of(even, ["strong"], ["natural"], [1, 2], 1, list(even), 1)[1]["run"].endswith("natural-1")


def test_the_table_says_what_was_measured_and_marks_losses_that_disagree() -> None:
    results = canned()
    rows = rows_of(results, ["strong", "weak"], ["natural"], [1, 2], 1, list(results), 1)
    rows[1]["note"] = "2 processes on 1 cores: oversubscribed"
    text = render(rows, facts(results))
    assert "losses agree: over all 4 steps, 7 runs" in text and "!" not in text
    assert "takes 100 us + bytes / (1.00 GB/s); medians of 18 calls" in text and "64 KiB" in text
    assert "2 processes on 1 cores: oversubscribed; its figures say nothing about scaling" in text
    columns = next(line for line in text.splitlines() if line.startswith("   2*")).split()
    assert columns[1:3] == ["natural", "143"] and "0.714" in columns

    wrong = results[Run(2, 4, "natural", 2)]["metrics"][-1]
    wrong["loss"] *= 1 + 3e-5
    rows = rows_of(results, ["strong"], ["natural"], [1, 2], 1, list(results), 1)
    marked = facts(results)
    assert not marked["losses_agree"] and rows[1]["loss_difference"] == pytest.approx(3e-5)
    text = render(rows, marked)
    assert "LOSSES DO NOT AGREE" in text and "(at 2-ranks-4-sequences-natural-3)" in text and "3.0e-05 !" in text


def test_sizes_that_only_weak_scaling_has_are_not_compared_with_the_base() -> None:
    results = canned()
    for run, one in results.items():
        if run.batch == 8:
            for step in one["metrics"]:
                step["loss"] += 1
    assert parity_sentence(results, 1, 4)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "1", "5"], "data.lanes = 192 cannot be dealt to 5 ranks"),
        (["--sizes", "1", "2", "--global-batch", "6", "--micro-batch", "2"], "train.global_batch_size = 6 is not a"),
        (["--sizes", "2", "4", "--base", "1"], "--base 1 is not among --sizes 2 4"),
        (["--sizes", "2", "2"], "each must be at least 1 and given once"),
        (["--ep-size", "3"], "--ep-size 3 does not divide model.n_routed_experts = 16"),
        (["--set", "train.steps=9"], "the benchmark sets train.steps itself; use --steps and --warm-up"),
        (["--set", "model.hidden=9"], "model.hidden"),
        (["--ranks-per-node", "2"], "--ranks-per-node is for --launcher ray"),
        (["--repeats", "0", "--warm-up", "0"], "--repeats = 0 is out of range"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    data = tmp_path / "python"  # a built-in corpus that would be packed
    arguments = ["bench", "scaling", "--set", f"data.path={data}", "--out", str(out), *options]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() and not data.exists()
