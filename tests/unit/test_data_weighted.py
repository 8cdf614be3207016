"""Weighted sources in one packing: what the folder holds, that training draws by the weights, verify and audit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.audit import audit_run
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import DataError
from data.manifest import read_documents, read_manifest
from data.mixture import open_data, plan_of
from data.pack import pack, pack_weighted
from data.packing import Settings
from data.stream import Stream
from data.verify import verify
from data.weighted import WeightedSource, read_mixture, resolved
from tests.unit.data_samples import write_folder

SETTINGS = Settings("bytes", shard_mb=0.008)


def sources(root: Path) -> list[WeightedSource]:
    """Two sources, 3 to 1, one document in both."""
    code, notes = write_folder(root / "code", 40), write_folder(root / "notes", 30, seed=5)
    shutil.copy(code / "file003.txt", notes / "again.txt")
    return [WeightedSource("code", str(code), 3), WeightedSource("notes", str(notes), 1)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weighted")
    pack_weighted(sources(root), root / "mix", SETTINGS, licence="MIT")
    return root / "mix"


def config_of(path: Path | str) -> DataConfig:
    return DataConfig(path=str(path), seq_len=32, lanes=12, window_shards=2)


def test_the_folder_says_what_it_was_made_of(mixed: Path) -> None:
    mixture = read_mixture(mixed)
    assert mixture is not None
    assert [(source.name, source.weight, source.licence) for source in mixture.sources] == [
        ("code", 3.0, "MIT"),
        ("notes", 1.0, "MIT"),
    ]
    names: list[str] = []
    for source in mixture.sources:
        manifest, rows = read_manifest(mixed / source.name), list(read_documents(mixed / source.name))
        assert (source.fingerprint, source.n_tokens) == (manifest.fingerprint, manifest.train.n_tokens)
        assert source.n_heldout == manifest.heldout.n_documents >= 3
        assert {row["source"] for row in rows} == {source.name} and {row["licence"] for row in rows} == {"MIT"}
        names += (row["name"] for row in rows)
    assert len(names) == 70 and "again.txt" not in names, "of identical documents the first source's is kept"
    assert read_manifest(mixed / "notes").n_duplicates == 1
    with pytest.raises(DataError, match=r"weighted sources; give it as data\.path"):
        open_dataset(mixed)


def test_training_reads_the_sources_by_their_weights_and_the_audit_knows_it(mixed: Path, tmp_path: Path) -> None:
    config = config_of(mixed)
    with open_data(config) as dataset:
        plan = plan_of(dataset, config, 12)
        assert plan.identity()["mixture"] == [[0, 750, 250]]
        ids, lines = [], []
        with Stream(dataset, plan, 0, 1, 12, 4) as stream:
            for step in range(20):
                ids += [number for micro in stream.read(step) for number in micro.sequence_ids.tolist()]
                lines.append(stream.ledger_line(step, stream.consumed_hash(step)))
        assert np.bincount(np.array(ids) % 2).tolist() == [180, 60]
        same = replace(config, path="", mixture=(str(mixed / "code"), str(mixed / "notes")), weights=(3.0, 1.0))
        with open_data(same) as other:
            assert other.fingerprint == dataset.fingerprint and plan_of(other, same, 12).digest() == plan.digest()
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "[data]\npath = {}\nseq_len = 32\nlanes = 12\nwindow_shards = 2\n[train]\nglobal_batch_size = 12\n"
    (run / "config.toml").write_text(text.format(json.dumps(str(mixed))))
    assert audit_run(run).ok and audit_run(run).n_sequences == 240
    moved = shutil.copytree(mixed, tmp_path / "moved")
    (run / "config.toml").write_text(text.format('"/gone"'))
    assert audit_run(run, moved).ok
    (run / "config.toml").write_text(text.format(json.dumps(str(mixed / "code"))))
    assert not audit_run(run).ok


def test_the_section_resolves_to_a_mixture_and_given_weights_win(mixed: Path) -> None:
    found = resolved(config_of(mixed))
    assert found.mixture == (f"{mixed}/code", f"{mixed}/notes") and found.weights == (3.0, 1.0)
    assert found.problems() == [] and resolved(found) == found
    assert resolved(replace(config_of(mixed), weights=(1.0, 1.0))).weights == (1.0, 1.0)
    given = ((0.0, 1.0, 1.0), (9.0, 1.0, 2.0))
    changing = resolved(replace(config_of(mixed), curriculum=given))
    assert changing.weights == () and changing.curriculum == given and changing.problems() == []
    plain = config_of(mixed / "code")
    assert resolved(plain) == plain and resolved(config_of("datasets/none")) == config_of("datasets/none")


def test_packing_again_reuses_and_other_weights_are_other_data(mixed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mix"
    shutil.copytree(mixed, copy)
    root = mixed.parent
    both = [WeightedSource("code", str(root / "code"), 3), WeightedSource("notes", str(root / "notes"), 1)]
    assert pack_weighted(both, copy, SETTINGS, licence="MIT").reused
    (copy / "notes" / "train-00000.tar").unlink()
    assert not pack_weighted(both, copy, SETTINGS, licence="MIT").reused
    other = [replace(both[0], weight=2.0), both[1]]
    with pytest.raises(DataError, match="other inputs"):
        pack_weighted(other, copy, SETTINGS, licence="MIT")
    said = str(pack_weighted(other, copy, SETTINGS, licence="MIT", overwrite=True))
    assert "code: 66.7% of the sequences" in said
    with pytest.raises(DataError, match="other inputs"):
        pack([str(root / "code")], copy, tokenizer="bytes")


def test_an_interrupted_packing_keeps_the_finished_source(tmp_path: Path) -> None:
    both = sources(tmp_path)
    pack_weighted(both, tmp_path / "whole", SETTINGS)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "encoding notes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_weighted(both, tmp_path / "mix", replace(SETTINGS, progress=interrupt))
    (left,) = tmp_path.glob("mix.tmp-*")
    left.rename(left.with_name(left.name.rpartition("-")[0] + "-999999999"))  # whose process is dead
    seen: list[str] = []
    pack_weighted(both, tmp_path / "mix", replace(SETTINGS, progress=lambda phase, done, total: seen.append(phase)))
    assert "encoding notes" in seen and "encoding code" not in seen
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and path.name != "pack.json":
            again = tmp_path / "mix" / path.relative_to(tmp_path / "whole")
            assert again.read_bytes() == path.read_bytes(), path
    assert not list(tmp_path.glob("mix.tmp-*"))


def test_verify_checks_every_source_and_the_list_itself(mixed: Path, tmp_path: Path) -> None:
    assert verify(mixed) == []
    copy = shutil.copytree(mixed, tmp_path / "mix")
    shard = copy / "notes" / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    (damage,) = verify(copy)
    assert damage.file == "notes/train-00000.tar" and len(damage.lost) == 1
    shutil.rmtree(copy / "notes")
    shutil.copytree(mixed / "code", copy / "notes")
    assert "another dataset" in "".join(map(str, verify(copy)))
    shutil.rmtree(copy / "notes")
    assert [damage.file for damage in verify(copy)] == ["notes/manifest.json"]
    text = (mixed / "mixture.json").read_text()
    for changed in (text.replace("3.0", "2.0"), "{}", "[]", text.replace('"notes"', '"../notes"')):
        (copy / "mixture.json").write_text(changed)
        assert [damage.file for damage in verify(copy)] == ["mixture.json"]
        with pytest.raises(DataError, match=r"mixture\.json"):
            open_data(config_of(copy))


def test_names_and_weights_are_checked(tmp_path: Path) -> None:
    assert WeightedSource.parse("code=~/a=b@0.7") == WeightedSource("code", "~/a=b", 0.7)
    assert WeightedSource.parse("code=s3://me@host/x") == WeightedSource("code", "s3://me@host/x", 1.0)
    for bad in ("code", "=x", "code=", "code=@2"):
        with pytest.raises(DataError, match="NAME=PATH"):
            WeightedSource.parse(bad)
    source = str(write_folder(tmp_path / "source", 3))
    for given, message in (
        ([WeightedSource("../a", source)], "plain name"),
        ([WeightedSource("a", source, -1.0)], "weight -1.0"),
        ([WeightedSource("a", source, float("nan"))], "weight nan"),
        ([WeightedSource("a", source, 0.0)], "all weights are 0"),
        ([WeightedSource("a", source), WeightedSource("A", source)], "twice"),
        ([WeightedSource("a", source), WeightedSource("b", source)], "the same text as another document"),
        ([], "no source"),
    ):
        with pytest.raises(DataError, match=message):
            pack_weighted(given, tmp_path / "out", SETTINGS)
        assert not (tmp_path / "out").exists()


def test_the_command_packs_weighted_sources_and_the_configuration_shows_them(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    both = sources(tmp_path)

    def trimtab(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *map(str, words)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)

    given = [word for source in both for word in ("--source", f"{source.name}={source.path}@{source.weight}")]
    command = ["data", "pack", *given, "--out", tmp_path / "mix", "--tokenizer", "bytes", "--json"]
    done = trimtab(*command)
    assert done.returncode == 0, done.stderr
    assert [source["weight"] for source in json.loads(done.stdout.splitlines()[-1])["sources"]] == [3.0, 1.0]
    shown = trimtab("train", "debug", f"data.path={tmp_path / 'mix'}", "--print-config")
    assert f'mixture = ["{tmp_path}/mix/code", "{tmp_path}/mix/notes"]' in shown.stdout, shown.stdout + shown.stderr
    assert "weights = [3.0, 1.0]" in shown.stdout
    refused = trimtab(*command, both[0].path)
    assert refused.returncode == 2 and "exclude each other" in refused.stderr
