"""Packing: what is in the shards, what is reused, resumed, refused, and how it opens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.crc32c import crc32c
from data.dataset import describe, open_dataset
from data.errors import DataError
from data.index import key_hash
from data.manifest import read_documents, read_manifest
from data.pack import pack
from tests.unit.data_samples import pack_small, stored_texts, write_folder


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_comes_back(tmp_path: Path, tokenizer: str) -> None:
    path = pack_small(tmp_path, tokenizer=tokenizer)
    source = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    assert stored_texts(path) == source
    manifest = read_manifest(path)
    assert len(manifest.train.shards) > 2
    assert manifest.train.n_bytes + manifest.heldout.n_bytes == sum(map(len, source.values()))
    assert manifest.lossless


def test_webdataset_reads_the_shards_unmodified(tmp_path: Path) -> None:
    import webdataset

    path = pack_small(tmp_path)
    manifest = read_manifest(path)
    urls = [str(path / shard.file) for shard in (*manifest.train.shards, *manifest.heldout.shards)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=True))
    names = {row["key"]: row["name"] for row in read_documents(path)}
    assert len(samples) == len(names) == 60
    for sample in samples:
        tokens = np.frombuffer(sample["tok"], manifest.dtype)
        text = (tmp_path / "source" / names[sample["__key__"]]).read_bytes()
        assert bytes(tokens[:-1].tolist()) == text
        assert sample.get("txt", text) == text


@pytest.mark.parametrize("n_bytes", [1, 254, 255, 256, 511])
def test_samples_that_fill_their_blocks(tmp_path: Path, n_bytes: int) -> None:
    """255 bytes and the end token are exactly one tar block of two-byte tokens."""
    (tmp_path / "source").mkdir()
    for number in range(5):
        (tmp_path / "source" / f"{number}.txt").write_bytes(str(number).encode() * n_bytes)
    pack([str(tmp_path / "source")], tmp_path / "out", tokenizer="bytes", heldout=0)
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        assert [(member.name, member.size) for member in tar] == [(f"{n:08d}.tok", 2 * n_bytes + 2) for n in range(5)]


def test_index_describes_the_tar(tmp_path: Path) -> None:
    path = pack_small(tmp_path)
    with open_dataset(path) as dataset:
        for shard, info in enumerate(dataset.manifest.train.shards):
            records = dataset.train.records(shard)
            with tarfile.open(path / info.file) as tar:
                members = tar.getmembers()
                assert [member.offset_data for member in members] == records["offset"].tolist()
                assert [member.size for member in members] == records["nbytes"].tolist()
                for member, record in zip(members, records, strict=True):
                    assert key_hash(member.name.removesuffix(".tok")) == record["key_hash"]
                    extracted = tar.extractfile(member)
                    assert extracted is not None and crc32c(extracted.read()) == record["crc32c"]


def test_same_inputs_same_bytes_and_reuse(tmp_path: Path) -> None:
    first, second = pack_small(tmp_path), tmp_path / "again"
    report = pack([str(tmp_path / "source")], second, tokenizer="bytes", shard_mb=0.008)
    assert not report.reused and "packed" in str(report)
    assert read_manifest(first).fingerprint == report.manifest.fingerprint
    for file in first.iterdir():
        if file.name != "pack.json":
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name

    before = {file: file.stat().st_mtime_ns for file in second.iterdir()}
    again = pack([str(tmp_path / "source")], second, tokenizer="bytes", shard_mb=0.008)
    assert again.reused and "reused" in str(again)
    assert before == {file: file.stat().st_mtime_ns for file in second.iterdir()}


def test_other_inputs_do_not_replace_a_dataset_unasked(tmp_path: Path) -> None:
    path = pack_small(tmp_path)
    fingerprint = read_manifest(path).fingerprint
    source = [str(tmp_path / "source")]
    with pytest.raises(DataError, match="other inputs"):
        pack(source, path, tokenizer="bytes", shard_mb=1)
    assert read_manifest(path).fingerprint == fingerprint
    assert not pack(source, path, tokenizer="bytes", shard_mb=1, overwrite=True).reused
    assert read_manifest(path).fingerprint != fingerprint
    (tmp_path / "source" / "file000.txt").write_text("changed")
    with pytest.raises(DataError, match="other inputs"):
        pack(source, path, tokenizer="bytes", shard_mb=1)


def test_a_damaged_dataset_is_packed_again_from_the_same_inputs(tmp_path: Path) -> None:
    path = pack_small(tmp_path)
    (path / "train-00001.tar").unlink()
    assert not pack([str(tmp_path / "source")], path, tokenizer="bytes", shard_mb=0.008).reused
    open_dataset(path).close()


def test_a_folder_that_is_not_a_dataset_is_left_alone(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a packed dataset"):
        pack([str(source)], tmp_path / "mine", tokenizer="bytes", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert not pack([str(source)], tmp_path / "empty", tokenizer="bytes").reused


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_packing_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("data.encode._BATCH_BYTES", 2000)
    monkeypatch.setattr("data.encode._SAVE_BYTES", 3000)
    source = write_folder(tmp_path / "source")
    options: dict = {"tokenizer": "bytes", "shard_mb": 0.008}
    pack([str(source)], tmp_path / "whole", **options)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "encoding" and done > interrupt.after * total:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    for share in (0.3, 0.7):
        interrupt.after = share  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            pack([str(source)], tmp_path / "out", progress=interrupt, **options)
        assert not (tmp_path / "out").exists()
        (left,) = [entry for entry in tmp_path.iterdir() if entry.name.startswith("out.tmp-")]
        left.rename(left.with_name(left.name.rpartition("-")[0] + "-999999999"))  # whose process is dead
    begun = []
    pack(
        [str(source)], tmp_path / "out", workers=workers, **options,
        progress=lambda phase, done, total: begun.append(done / total) if phase == "encoding" else None,
    )  # fmt: skip
    assert begun[0] > 0.6, "it went on where it was"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source", "whole"]
    for path in (tmp_path / "whole").iterdir():
        if path.name != "pack.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_ranks_of_an_mpi_job_pack_the_same_bytes(tmp_path: Path) -> None:
    from cluster.mpi import mpirun_environment

    root = Path(__file__).resolve().parents[2]
    source = write_folder(tmp_path / "source", n_documents=40)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; import data.encode; data.encode._BATCH_BYTES = 3000\n"
        "from launch.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(script), "data", "pack", str(source), "--tokenizer", "bytes", "--shard-mb", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **mpirun_environment()}
    mpirun = str(Path(sys.executable).parent / "mpirun")
    assert Path(mpirun).exists(), "requirements.txt installs an MPI; without it this would prove nothing"
    for name, start in (("one", []), ("many", [mpirun, "-n", "4"])):
        done = subprocess.run(
            [*start, *command, "--out", str(tmp_path / name)], env=environment, cwd=tmp_path, timeout=120,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("packed ") == 1
    for path in (tmp_path / "one").iterdir():
        if path.name != "pack.json":
            assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes(), path.name
    refused = subprocess.run(
        [mpirun, "-n", "2", *command[:4], str(tmp_path / "none"), "--out", str(tmp_path / "x")], env=environment,
        cwd=tmp_path, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "neither a built-in corpus" in refused.stderr


def test_two_processes_pack_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is first: its folder is kept and reported as reused."""
    source = write_folder(tmp_path / "source", 8)
    rename = os.rename

    def other_was_first(old: Path, new: Path) -> None:
        if not Path(new).exists():
            shutil.copytree(old, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", other_was_first)
    assert pack([str(source)], tmp_path / "out", tokenizer="bytes").reused
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": 0, "a": 1, "b": 2, "high": 100_000, "?": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a  b high")
    manifest = pack(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        tokenizer=str(tmp_path / "words.json"),
        heldout=0,
        allow_lossy=True,
    ).manifest
    assert manifest.dtype == "<u4" and manifest.vocab_size == 100_001 and not manifest.lossless
    with open_dataset(tmp_path / "out") as dataset:
        assert dataset.train.read(0, 0).tolist() == [1, 2, 100_000, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "no source"),
        ({"sources": ["no/such/place"]}, "neither a built-in corpus"),
        ({"tokenizer": "bpe:12"}, "at least 257"),
        ({"tokenizer": "nothing.json"}, "neither bytes"),
        ({"shard_mb": 0}, "shard_mb"),
        ({"heldout": 0.9}, "heldout"),
        ({"heldout_kib": -1}, "heldout_kib"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    source = write_folder(tmp_path / "source", 3)
    with pytest.raises(DataError, match=message):
        pack(**{"sources": [str(source)], "out": tmp_path / "out", "tokenizer": "bytes", **arguments})
    assert not (tmp_path / "out").exists()


def test_progress_ends_complete(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 20)
    seen: list[tuple[str, int, int]] = []
    pack([str(source)], tmp_path / "out", tokenizer="bpe:300", progress=lambda *args: seen.append(args))
    total = sum(file.stat().st_size for file in source.iterdir())
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["reading", "training the tokenizer", "encoding"]
    assert seen[-1] == ("encoding", total, total)


def test_describe_needs_only_the_manifest(tmp_path: Path) -> None:
    path = pack_small(tmp_path)
    for file in path.iterdir():
        if file.name != "manifest.json":
            file.unlink()
    description = describe(path)
    assert (description.vocab_size, description.eod_id, description.tokenizer) == (257, 256, "bytes")
    assert description.n_documents + description.n_heldout == 60


def test_opening_what_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        describe(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        describe(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="not a packed dataset"):
        describe(tmp_path / "other")
    for content in ("", "[]", "{}", '{"format": "trimtab-dataset", "version": 1}', '{"format": "trimtab-dataset"}'):
        (tmp_path / "other" / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json"):
            describe(tmp_path / "other")


def test_opening_a_dataset_with_changed_files(tmp_path: Path) -> None:
    path = pack_small(tmp_path)

    def broken(name: str, content: bytes | None, message: str) -> None:
        file = path / name
        before = file.read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            dataset = open_dataset(path)
            for shard in range(len(dataset.manifest.train.shards)):
                dataset.train.records(shard)
            assert dataset.tokenizer
        file.write_bytes(before)

    index = (path / "train-00000.idx").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    broken("train-00000.tar", None, "shard is missing")
    broken("train-00000.tar", b"", "0 bytes instead of")
    broken("train-00000.idx", None, "index is missing")
    broken("train-00000.idx", b"x" * 100, "not an index")
    broken("train-00000.idx", index[:-1], "records need")
    broken("train-00000.idx", index[:20] + b"\xff" + index[21:], "header is damaged")
    broken("train-00000.idx", index[:-3] + b"\xff" + index[-2:], "records are damaged")
    broken("train-00000.idx", (path / "train-00001.idx").read_bytes(), "another shard")
    broken("tokenizer.json", None, "missing")
    broken("documents.jsonl", None, "missing")
    other = (path / "tokenizer.json").read_bytes().replace(b"257", b"999")
    broken("tokenizer.json", other, "not the bytes tokenizer")
    changed = json.dumps({**manifest, "vocab_size": 300}, indent=1, sort_keys=True).encode()
    broken("manifest.json", changed, "changed after packing")
    open_dataset(path).close()
