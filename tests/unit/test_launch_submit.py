"""What `submit` checks here and what it leaves to the job, and which cluster it means."""

from pathlib import Path

import pytest

from launch import preflight
from launch.cli import build_parser
from launch.config import ConfigError
from launch.submit import check_access, dashboard_address, submit


def test_with_an_address_what_lies_under_paths_is_left_to_the_job(tmp_path: Path) -> None:
    words = [f"data.path={tmp_path / 'on-the-cluster'}"]
    plan = preflight.check("debug", words, run=str(tmp_path / "run"), launcher="ray", elsewhere=True)
    assert (plan.builtin, plan.done) == ("", False) and "checked by the job" in plan.notes[-1]
    with pytest.raises(ConfigError, match="no such folder"):
        preflight.check("debug", words, run=str(tmp_path / "run"), launcher="ray")
    with pytest.raises(ConfigError, match=r"train\.steps"):  # what needs no disk is checked here
        preflight.check("debug", [*words, "train.steps=-1"], run=None, launcher="ray", elsewhere=True)


@pytest.mark.parametrize("key", ["--run", "checkpoint.dir"])
def test_what_a_run_leaves_must_not_lie_in_rays_cache(tmp_path: Path, key: str) -> None:
    cache = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    words = [] if key == "--run" else [f"checkpoint.dir={cache}/ckpt"]
    run = str(cache / "runs" / "rel") if key == "--run" else str(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{key} .*_ray_pkg_1.* removes when it likes.* /shared/runs/"):
        preflight.check("debug", words, run=run, launcher="ray")


def test_the_address_that_is_meant_and_what_is_not_heeded(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert dashboard_address(None) == "" and dashboard_address("http://127.0.0.1:1/") == "http://127.0.0.1:1"
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert dashboard_address(None) == ""
    assert "RAY_ADDRESS = http://other:8265 is not used by submit: a local cluster" in capsys.readouterr().out
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert dashboard_address(None) == "http://third:8265"
    assert dashboard_address("http://127.0.0.1:1") == "http://127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS = http://third:8265 is not" in capsys.readouterr().out


def test_insecure_does_not_make_a_dashboard_of_anything() -> None:
    with pytest.raises(ConfigError, match="not the address of a Ray dashboard"):
        check_access("auto", insecure=True)


def test_no_wait_needs_a_cluster_that_stays(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    options = build_parser().parse_args(["submit", "debug", "--no-wait", "--run", str(tmp_path / "run")])
    with pytest.raises(ConfigError, match="--no-wait needs --address"):
        submit(options)
    assert not (tmp_path / "run").exists()
