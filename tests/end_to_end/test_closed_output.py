"""A reader that goes away (`| head`) ends no run and is not taken for a fault of the storage."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, TRIMTAB, events, metrics


@pytest.mark.parametrize("launcher", ["debug", "local"])
def test_training_outlives_the_reader_of_its_output(launcher: str, config: Path, tmp_path: Path) -> None:
    command = [
        *TRIMTAB, "train", str(config), "--launcher", launcher, "--run", "run", "cluster.workers=1",
        "parallel.ep_size=1", "train.steps=3",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(200) == 0, said
    assert said.count("standard output was closed by its reader") == 1 and "Traceback" not in said, said
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
    kinds = [(event["kind"], event["cause"]) for event in events(tmp_path / "run")]
    assert not [kind for kind, _ in kinds if kind in ("failure", "restart")]
    assert any(kind == "fault" and "closed by its reader" in cause for kind, cause in kinds)
    assert (tmp_path / "run" / "report.md").is_file()
