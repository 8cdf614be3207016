"""Drills: what may be asked for, and that each strikes where and as often as it says."""

import errno
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from data.errors import DataError
from launch.config import Config, layout_problems
from launch.drills import DrillError, Faults
from launch.faults import SAVE_POINTS, FaultsConfig, parse
from launch.runfolder import utc_now
from model.exchange import LocalExchange


def test_what_may_be_asked_for() -> None:
    faults, problems = parse("kill@rank=1,step=3,phase=backward; slow@rank=0,seconds=0.2,times=0;")
    assert problems == []
    assert [(f.kind, f.rank, f.step, f.phase, f.times, f.seconds) for f in faults] == [
        ("kill", 1, 3, "backward", 1, 0.0), ("slow", 0, 0, "forward", 0, 0.2),
    ]  # fmt: skip
    assert FaultsConfig().problems() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("explode@rank=1", "'explode' is no kind of fault; use one of kill, hang"),
        ("kill@rank=1,when=3", "'when=3' is not one of rank=..."),
        ("kill@rank", "'rank' is not one of"),
        ("kill@step=x", "step=x must be a number"),
        ("kill@rank=-1", "rank=-1 must not be negative"),
        ("kill@phase=moon", "phase=moon is not where kill can strike; use forward, start, load, data"),
        ("nan@phase=save", "phase=save is not where nan can strike; use backward"),
        ("kill@phase=save,at=lunch", "at=lunch needs phase=save and one of before_write"),
        ("kill@at=cleanup", "at=cleanup needs phase=save"),
        ("raise@phase=start,step=1", "phase=start is before the first step; leave step out"),
        ("kill@seconds=3", "seconds=3 is for slow, hang and clock"),
        ("slow@seconds=-1", "seconds=-1 must not be negative"),
        ("clock@step=3", "clock needs seconds=..., by which it jumps"),
        ("clock@seconds=inf", "clock needs seconds=..., by which it jumps"),
    ],
)
def test_every_mistake_is_named(text: str, said: str) -> None:
    good = "kill@rank=0,step=1"
    [problem] = FaultsConfig(f"{good}; {text}").problems()
    assert problem.startswith(f"faults.inject: {text!r}: ") and said in problem


def test_a_rank_that_is_not_there_is_refused() -> None:
    from dataclasses import replace

    config = replace(Config(), faults=FaultsConfig("kill@rank=2,step=1"))
    said = [problem for problem in layout_problems(config, "local", 2) if "faults" in problem]
    assert said == ["faults.inject: 'kill@rank=2,step=1': rank=2 does not exist in a world of 2 ranks; use 0 to 1"]


def test_it_strikes_its_rank_at_its_place_once_over_all_generations(tmp_path: Path) -> None:
    record, text = tmp_path / "faults.jsonl", "raise@rank=1,step=3,phase=data"
    Faults(text, rank=0, record=record).at("data", 3)
    faults = Faults(text, 1, record)
    faults.at("data", 2)
    faults.at("forward", 3)
    assert not record.exists()
    with pytest.raises(DrillError, match="raise@rank=1,step=3,phase=data"):
        faults.at("data", 3)
    Faults(text, 1, record, generation=1).at("data", 3)
    [line] = [json.loads(line) for line in record.read_text().splitlines()]
    assert (line["fault"], line["rank"], line["generation"], line["step"]) == (text, 1, 0, 3)


def test_twice_and_always(tmp_path: Path) -> None:
    for times, struck in ((2, 2), (0, 4)):
        count = 0
        for generation in range(4):
            faults = Faults(f"bad_read@step=3,times={times}", 0, tmp_path / f"{times}.jsonl", generation)
            try:
                faults.at("data", 3)
            except DataError:
                count += 1
        assert count == struck


def test_a_full_disk_at_a_point_of_a_save(tmp_path: Path) -> None:
    faults = Faults("full_disk@step=4,at=mid_write", 0, tmp_path / "faults.jsonl")
    faults.save_hook(2)("mid_write")
    for point in SAVE_POINTS:
        if point == "mid_write":
            with pytest.raises(OSError, match="No space left") as caught:
                faults.save_hook(4)(point)
            assert caught.value.errno == errno.ENOSPC
        else:
            faults.save_hook(4)(point)


def test_without_a_point_a_save_is_struck_once_at_its_first(tmp_path: Path) -> None:
    faults, struck = Faults("raise@phase=save,times=0", 0, tmp_path / "f"), []
    for point in SAVE_POINTS:
        try:
            faults.save_hook(4)(point)
        except DrillError:
            struck.append(point)
    assert struck == ["before_write"]


class Tiny(nn.Module):
    """One replicated and one stacked parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(4))
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.down_proj = nn.Parameter(torch.ones(2, 4))

    def forward(self) -> torch.Tensor:
        return (self.norm * self.mlp.experts.down_proj).sum()


def test_nan_reaches_the_gradient_of_an_expert_only() -> None:
    model, faults = Tiny(), Faults("nan@step=2,times=0")
    faults.at("backward", 1, module=model)
    model().backward()
    assert model.mlp.experts.down_proj.grad is not None and model.mlp.experts.down_proj.grad.isfinite().all()
    model.zero_grad()
    faults.at("backward", 2, module=model)
    model().backward()
    assert model.mlp.experts.down_proj.grad.isnan().sum() == 1 and model.norm.grad.isfinite().all()
    model.zero_grad()
    model().backward()  # the hook has gone
    assert model.mlp.experts.down_proj.grad.isfinite().all()


def test_a_fault_in_backward_strikes_inside_it() -> None:
    model, faults = Tiny(), Faults("raise@step=2,phase=backward")
    faults.at("backward", 2, module=model)
    with pytest.raises(DrillError):
        model().backward()


def test_flip_changes_one_bit_of_what_is_replicated() -> None:
    model, faults = Tiny(), Faults("flip@step=2")
    faults.at("step", 2, module=model)
    changed = model.norm.view(torch.int32) ^ torch.ones(4).view(torch.int32)
    assert [bin(word).count("1") for word in changed.tolist()] == [1, 0, 0, 0]
    assert torch.equal(model.mlp.experts.down_proj, torch.ones(2, 4))


def test_phase_exchange_strikes_before_the_transfers() -> None:
    exchange = LocalExchange()
    assert Faults("raise@step=2").wrap(exchange) is exchange
    faults = Faults("raise@step=2,phase=exchange")
    drilled = faults.wrap(exchange)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    arguments = (torch.ones(2, 4), ids, torch.ones(2, 1), 2, lambda rows, *_: 3 * rows, ())
    faults.at("forward", 1)
    assert drilled.run(*arguments)[0].tolist() == [[3.0] * 4] * 2 and drilled.ep_size == 1
    faults.at("forward", 2)
    faults.save_hook(1)("mid_write")  # of an earlier step, from another thread
    with pytest.raises(DrillError):
        drilled.run(*arguments)


@pytest.mark.parametrize(("kind", "number"), [("kill", 9), ("stop", 19)])
def test_kill_and_stop_are_signals_to_itself(kind: str, number: int, monkeypatch, tmp_path: Path) -> None:
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append((pid, int(signal))))
    Faults(f"{kind}@step=1", 0, tmp_path / "faults.jsonl").at("forward", 1)
    assert sent == [(os.getpid(), number)]
    assert "forward" not in (tmp_path / "faults.jsonl").read_text() and (tmp_path / "faults.jsonl").read_text()


def test_slow_and_hang_take_their_time(monkeypatch) -> None:
    from launch import drills

    now = [0.0]
    monkeypatch.setattr(drills.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(drills.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    Faults("slow@step=1,seconds=0.3").at("forward", 1)
    assert now[0] == pytest.approx(0.3)
    Faults("hang@step=1,seconds=7").at("forward", 1)
    assert now[0] == pytest.approx(7.3)


def test_a_clock_jumps_back_and_forth_and_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", time.time)  # put back at the end
    text = "clock@step=2,seconds=3600; clock@step=3,seconds=-7200; clock@rank=1,step=3,seconds=9"
    assert FaultsConfig(text).problems() == []
    faults = Faults(text)
    real, steady = time.time, time.monotonic()
    for step, ahead in ((1, 0), (2, 3600), (3, -3600), (4, -3600)):
        faults.at("forward", step)
        assert abs(time.time() - real() - ahead) < 60
    assert 0 <= time.monotonic() - steady < 600
    assert utc_now() < datetime.fromtimestamp(real() - 3000, UTC).isoformat()
