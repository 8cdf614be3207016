"""The summary in a process of its own: how that ends is told, and is never taken for bad input."""

from pathlib import Path

import pytest

from launch.summary_process import summarize_apart


@pytest.mark.parametrize(("end", "said"), [("os._exit(2)", "status 2"), ("os.kill(os.getpid(), 11)", "signal 11")])
def test_a_process_that_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os\n{end}\n")  # as a library that gives up while it is loaded
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told: list[str] = []
    assert not summarize_apart(tmp_path / "run", told.append)
    assert said in told[0] and "The run is trained and saved" in told[0] and f"report {tmp_path / 'run'}" in told[0]
