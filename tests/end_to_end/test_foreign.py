"""Training on plain tar files: it works, says that it cannot be resumed, and is not resumed."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.end_to_end.conftest import metrics


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(20):
                text = f"text {shard} {number} " * 20
                name = f"www.example.org.{number}.txt" if shard else f"{number:03d}.txt"
                info = tarfile.TarInfo(name if number else f"{number}.png")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    return folder


@pytest.mark.slow
def test_plain_tar_files_train_on_two_ranks_and_are_not_resumed(trimtab, config: Path, tars: Path, tmp_path) -> None:
    command = ["train", config, 'data.mode="stream"', f"data.path={tars}", "--launcher", "local"]
    done = trimtab(*command, "train.steps=4", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT RESUMABLE" in done.stdout + done.stderr
    assert "38 members *.txt and 0 *.json; 2 other members are not read (2 .png)" in done.stdout + done.stderr
    assert "data at step" in done.stdout and "documents; left out: 1 members .png" in done.stdout
    assert metrics(tmp_path / "run")[-1]["documents"] >= 4
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    again = trimtab(*command, "train.steps=8", "--run", tmp_path / "run")
    assert again.returncode == 2 and "cannot be resumed" in again.stderr and "--run" in again.stderr
    audited = trimtab("data", "audit", tmp_path / "run")
    assert audited.returncode == 2 and "no plan to audit" in audited.stderr
    said = trimtab("generate", tmp_path / "run", "--prompt", "text", "--max-new-tokens", "4", "--temperature", "0")
    assert said.returncode == 0 and said.stdout.startswith("text")


def test_missing_tar_files_and_small_vocabularies_are_refused_at_once(trimtab, config: Path, tars, tmp_path) -> None:
    done = trimtab("train", config, 'data.mode="stream"', f"data.path={tmp_path / 'none'}", "--launcher", "debug")
    assert done.returncode == 2 and "no tar file there" in done.stderr
    done = trimtab(
        "train", config, 'data.mode="stream"', f"data.path={tars}", "model.vocab_size=200", "--launcher", "debug"
    )
    assert done.returncode == 2 and "257 tokens of data.tokenizer" in done.stderr
    (tars / "9.tar").write_bytes((tars / "0.tar").read_bytes()[:5000])
    done = trimtab("train", config, 'data.mode="stream"', f"data.path={tars}", "--launcher", "debug")
    assert done.returncode == 2 and "9.tar: the file is cut or damaged" in done.stderr
