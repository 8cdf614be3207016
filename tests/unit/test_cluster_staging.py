"""The folder that is sent to a cluster holds the code and nothing else."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from cluster.staging import ROOMS, stage

ROOT = Path(__file__).resolve().parents[2]


def test_the_rooms_and_extra_files_are_staged(tmp_path):
    stage(ROOT, tmp_path / "job", extra={"config.toml": "x = 1\n", "deep/er/note.txt": "hello"})
    job = tmp_path / "job"
    assert set(ROOMS) <= {path.name for path in job.iterdir()}
    assert (job / "cluster" / "staging.py").read_bytes() == (ROOT / "cluster" / "staging.py").read_bytes()
    assert (job / "trimtab.py").exists() and (job / "pyproject.toml").exists()
    assert (job / "config.toml").read_text() == "x = 1\n" and (job / "deep/er/note.txt").exists()
    names = {path.name for path in job.rglob("*")}
    assert "__pycache__" not in names and ".venv" not in names and ".git" not in names
    assert sum(path.stat().st_size for path in job.rglob("*") if path.is_file()) < 10 * 1024 * 1024


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil"])
def test_extra_files_stay_inside(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of"):
        stage(ROOT, tmp_path, folders=(), extra={name: ""})


def test_the_ignore_file_keeps_data_runs_and_secrets_away():
    lines = (ROOT / ".rayignore").read_text().split()
    for pattern in ("/.venv", "/runs", "/datasets", "/.git", "*.safetensors", "*.tar", "*.pem"):
        assert pattern in lines


def test_the_ignore_file_leaves_all_code_in():
    lines = (ROOT / ".rayignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    code = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.*") if path.suffix != ".pyc"]
    assert len(code) > 50
    for path in code:
        if "__pycache__" in path.parts:
            continue
        assert not any(fnmatch(path.name, pattern) or fnmatch(f"/{path.parts[0]}", pattern) for pattern in patterns)
