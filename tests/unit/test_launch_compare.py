"""Runs side by side: the newest held-out figures, and the curves of runs that evaluated as they trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.compare import MAX_CURVE_ROWS, compare
from launch.runfolder import RunFolder


def run_of(folder: Path, losses: dict[int, float], steps: int, at_end: dict[str, Any] | None = None) -> Path:
    run = RunFolder(folder)
    run.create("")
    for step in range(1, steps + 1):
        record: dict[str, Any] = {"step": step, "loss": 4.0, "step_seconds": 1.0, "tokens": step}
        if step in losses:
            record |= {"heldout_loss": losses[step], "heldout_bits_per_byte": losses[step] / 2}
        run.metrics.append(record)
    if at_end:
        run.event("evaluation", cause="end of training", **at_end)
    run.close()
    return folder


def test_curves_and_the_newest_figures(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", {10: 3.5, 20: 3.25}, 20, {"step": 20, "heldout_loss": 3.24, "bits_per_byte": 1.6})
    older = {"step": 10, "heldout_loss": 9.0, "bits_per_byte": 9.0}
    two = run_of(tmp_path / "two", {10: 3.75, 15: 3.0}, 15, older)
    none = run_of(tmp_path / "none", {}, 3)
    table, figures = compare([one, two, none])
    assert figures[str(one)]["heldout_loss"] == 3.24 and figures[str(one)]["heldout_bits_per_byte"] == 1.6
    assert figures[str(two)]["heldout_loss"] == 3.0 and figures[str(two)]["heldout_bits_per_byte"] == 1.5
    assert "heldout_loss" not in figures[str(none)] and "heldout_curve" not in figures[str(none)]
    rows = [line.split() for line in table.split("nats a token, behind each step\n")[1].split("\n\n")[0].splitlines()]
    assert rows == [["step", str(one), str(two)], ["10", "3.5000", "3.7500"], ["15", "-", "3.0000"],
                    ["20", "3.2500", "-"]]  # fmt: skip
    assert json.loads(json.dumps(figures))[str(one)]["heldout_curve"] == [[10, 3.5], [20, 3.25]]
    assert "behind each step" not in compare([none])[0]


def test_a_long_curve_is_thinned_from_its_first_to_its_last_step(tmp_path: Path) -> None:
    table, _ = compare([run_of(tmp_path / "a", dict.fromkeys(range(1, 101), 3.0), 100)])
    rows = table.split("behind each step\n")[1].splitlines()[1:]
    assert len(rows) == MAX_CURVE_ROWS and rows[0].split()[0] == "1" and rows[-1].split()[0] == "100"


@pytest.mark.parametrize(("every", "mode", "said"), [
    (-1, "indexed", "train.evaluate_every_steps = -1 must not be negative"),
    (5, "stream", "needs held-out documents, which plain tar files"),
])  # fmt: skip
def test_the_key_is_checked(every: int, mode: str, said: str) -> None:
    from launch.config import Config, DataConfig, TrainConfig, layout_problems

    config = Config(train=TrainConfig(evaluate_every_steps=every), data=DataConfig(mode=mode))  # type: ignore[arg-type]
    assert any(said in problem for problem in [*config.problems(), *layout_problems(config, "debug", 1)])
