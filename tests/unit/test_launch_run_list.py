"""`trimtab runs` and `trimtab compare`: every run under a folder, and where several of them differ."""

import json
from pathlib import Path

import pytest

from launch.compare import compare, differing_keys
from launch.compare_plot import save_curves
from launch.config import ConfigError
from launch.report_html import write_html
from launch.run_list import list_runs, table
from launch.runfolder import RunFolder
from launch.runs_command import _runs


def make_run(path: Path, lr: float, steps: int, events: tuple[dict, ...] = ()) -> RunFolder:
    run = RunFolder(path)
    run.create(f"[optimizer]\nlr = {lr}\n[train]\nsteps = 10\n")
    for step in range(1, steps + 1):
        run.metrics.append(
            {"step": step, "tokens": step, "loss": 4.0 - 0.1 * step, "step_seconds": 1.0, "max_vio": 0.5}
        )
    for event in events:
        run.event(**event)
    run.close()
    return run


LAUNCH = {"kind": "launch", "cause": "trimtab train debug"}
DONE = {"kind": "end", "cause": "done", "exit_status": 0}
HELDOUT = {"kind": "evaluation", "cause": "end of training", "step": 10, "heldout_loss": 2.5, "bits_per_byte": 1.25}


def test_every_run_and_how_it_ended(tmp_path: Path) -> None:
    make_run(tmp_path / "deep" / "er" / "done", 0.1, 10, (LAUNCH, DONE, HELDOUT))
    make_run(tmp_path / "failed", 0.1, 3, (LAUNCH, {"kind": "end", "cause": "rank 1 failed\nmore", "exit_status": 1}))
    make_run(tmp_path / "stopped", 0.1, 4, (LAUNCH, {"kind": "end", "cause": "stopped on request", "exit_status": 75}))
    make_run(tmp_path / "again", 0.1, 4, (LAUNCH, DONE, LAUNCH))
    make_run(tmp_path / "fresh", 0.1, 0)
    broken = make_run(tmp_path / "broken", 0.1, 2)
    broken.metrics_path.write_text("not json\n{}\n")
    (tmp_path / "no run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "failed")
    found = {line.run: line for line in list_runs(tmp_path)}
    assert {name: line.state for name, line in found.items()} == {
        "again": "open", "broken": "damaged", "deep/er/done": "done", "failed": "failed", "fresh": "not started",
        "stopped": "stopped",
    }  # fmt: skip
    done = found["deep/er/done"]
    assert (done.steps, done.of, done.loss, done.heldout_bits_per_byte) == (10, 10, 3.0, 1.25)
    assert done.objective == "pretrain" and found["failed"].cause == "rank 1 failed"
    assert "line 1" in found["broken"].cause
    text = table(list_runs(tmp_path))
    assert len(text.splitlines()) == 7 and "10/10" in text and "stopped on request" in text
    assert [line.run for line in list_runs(tmp_path / "failed")] == ["failed"]  # the folder itself


def test_runs_as_json_and_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    make_run(tmp_path / "a", 0.1, 1)
    assert _runs(Namespace(folder=tmp_path, json=True)) == 0
    assert [line["run"] for line in json.loads(capsys.readouterr().out)["runs"]] == ["a"]
    with pytest.raises(ConfigError, match="not a folder"):
        _runs(Namespace(folder=tmp_path / "none", json=False))


def test_compare_says_where_runs_differ_and_what_they_reached(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", 0.1, 10, (LAUNCH, DONE, HELDOUT)).path
    other = make_run(tmp_path / "other", 0.2, 10, (LAUNCH, DONE)).path
    assert differing_keys([one, other]) == [["optimizer.lr", "0.1", "0.2"]]
    text, figures = compare([one, other])
    row = next(line for line in text.splitlines() if line.startswith(str(one)))
    assert "2.5000" in row and "1.2500" in row
    assert text.splitlines()[-1].split() == ["optimizer.lr", "0.1", "0.2"]
    assert figures[str(other)]["differs_in"] == {"optimizer.lr": "0.2"}
    assert "The configurations are the same." in compare([one, one.parent / "one" / "."])[0]


def test_curves_are_drawn(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 0.1, 10, (HELDOUT,)).path for name in ("one", "other")]
    runs.append(make_run(tmp_path / "empty", 0.1, 0).path)
    save_curves(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="cannot be written"):
        save_curves(tmp_path / "none" / "curves.png", runs)


def test_the_html_report_holds_its_pictures_and_no_markup_of_others(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"\x89PNG picture")
    text = "# Run x\n\n## Loss\n\n![Loss](plots/loss.png)\n\n## Events\n\n"
    text += "| a | b |\n|---|---|\n| 1 | <script>evil</script> |\n"
    (tmp_path / "report.md").write_text(text)
    page = write_html(tmp_path / "report.md").read_text()
    assert 'src="data:image/png;base64,iVBORyBwaWN0dXJl"' in page and "plots/loss.png" not in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert '<a href="#s2">Events</a>' in page and '<h2 id="s2">Events</h2>' in page and "<td>1</td>" in page
