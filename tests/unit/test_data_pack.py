"""Packing: what is in the shards, what is left out, held out, reused and refused."""

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

from data.builtin import BUILTIN_CORPORA
from data.corpus import open_source
from data.crc32c import crc32c
from data.dataset import describe, open_dataset
from data.errors import DataError
from data.heldout import choose_heldout, split_tail
from data.index import key_hash
from data.manifest import read_documents, read_manifest
from data.pack import builtin_at, pack, pack_builtin
from tests.unit.data_samples import pack_small, write_folder


def stored_texts(path: Path) -> dict[str, bytes]:
    """Every document's text, decoded from the stored tokens, by name."""
    names = {row["key"]: row["name"] for row in read_documents(path)}
    found = {}
    with open_dataset(path) as dataset:
        for split in (dataset.train, dataset.heldout):
            for shard, info in enumerate(split.info.shards):
                for row in range(info.n_documents):
                    tokens = split.read(shard, row)
                    assert tokens[-1] == dataset.manifest.eod_id and dataset.manifest.eod_id not in tokens[:-1]
                    found[names[split.key(shard, row)]] = dataset.tokenizer.decode_bytes(tokens.tolist())
    return found


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


def test_duplicates_binaries_and_empty_files_are_counted(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 10)
    (source / "sub").mkdir()
    (source / "sub" / "copy.txt").write_bytes((source / "file001.txt").read_bytes())
    (source / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / "image.png").write_bytes(b"\x89PNG\0\0")
    (source / "empty.txt").write_bytes(b"")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")
    manifest = pack([str(source)], tmp_path / "out", tokenizer="bytes").manifest
    assert manifest.n_duplicates == 1
    assert manifest.sources[0].skipped == {"empty": 1, "not UTF-8 text": 2}
    names = {row["name"] for row in read_documents(tmp_path / "out")}
    assert "sub/copy.txt" not in names or "file001.txt" not in names
    assert len(names) == 10 and not any(".git" in name for name in names)


def test_jsonl_text_and_several_sources(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one\\nline", "license": "MIT"}\n\n{"text": "two"}\n{"text": 5}\n{"text": "\\ud800"}\n'
    )
    (tmp_path / "book.md").write_text("# A book\n")
    folder = write_folder(tmp_path / "folder", 3)
    (folder / "LICENSE").write_text("free")
    out = tmp_path / "out"
    sources = [str(tmp_path / "rows.jsonl"), str(tmp_path / "book.md"), str(folder), str(folder)]
    manifest = pack(sources, out, tokenizer="bytes", heldout=0).manifest
    rows = {row["name"]: row for row in read_documents(out)}
    assert rows["rows.jsonl/rows.jsonl:1"]["licence"] == "MIT"
    assert rows["rows.jsonl/rows.jsonl:3"]["licence"] == "unknown"
    assert rows["folder/file000.txt"]["licence"] == "see LICENSE"
    assert stored_texts(out)["rows.jsonl/rows.jsonl:1"] == b"one\nline"
    assert [source.name for source in manifest.sources] == ["rows.jsonl", "book.md", "folder", "folder #2"]
    assert manifest.n_duplicates == 4 and manifest.heldout.n_documents == 0
    assert manifest.sources[0].skipped == {"field text is not a string": 1, "not UTF-8 text": 1}


def test_parquet_asks_for_pyarrow_or_reads(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pip install pyarrow"):
            pack([str(path)], tmp_path / "out", tokenizer="bytes")
        return
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "bb", None], "license": ["MIT", None, None]}), path)
    pack([str(path)], tmp_path / "out", tokenizer="bytes", heldout=0)
    assert stored_texts(tmp_path / "out") == {"rows.parquet:1": b"a", "rows.parquet:2": b"bb"}


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": 0, "a": 1, "b": 2, "high": 100_000, "?": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a  b high")
    manifest = pack(
        [str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tmp_path / "words.json"), heldout=0
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


def test_sources_without_text(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no files"):
        pack([str(tmp_path / "none")], tmp_path / "out", tokenizer="bytes")
    (tmp_path / "none" / "x.bin").write_bytes(b"\0\1")
    with pytest.raises(DataError, match="hold no text"):
        pack([str(tmp_path / "none")], tmp_path / "out", tokenizer="bytes")
    (tmp_path / "bad.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        pack([str(tmp_path / "bad.jsonl")], tmp_path / "out", tokenizer="bytes")


def test_heldout_choice_is_stable_and_capped() -> None:
    sizes = [(f"doc{i}", 1000 + i) for i in range(1000)]
    chosen = choose_heldout(sizes, 0.02, 1 << 20).names
    assert len(chosen) == 20
    more = choose_heldout([*sizes, *((f"new{i}", 900) for i in range(20))], 0.02, 1 << 20).names
    assert len(chosen & more) >= 17
    capped = choose_heldout(sizes, 0.02, 5000).names
    assert 3 <= len(capped) <= 4 and sum(dict(sizes)[name] for name in capped) <= 5000
    assert len(choose_heldout(sizes[:10], 0.02, 1 << 20).names) == 3
    assert choose_heldout(sizes, 0.0, 1 << 20).names == frozenset()
    alone = choose_heldout([("book", 1_000_000)], 0.02, 256 << 10)
    assert (alone.names, alone.tail, alone.tail_bytes) == (frozenset(), "book", 20_000)


def test_one_large_document_gives_its_end(tmp_path: Path) -> None:
    lines = "".join(f"line {number} é\n" for number in range(3000))
    (tmp_path / "book.txt").write_text(lines, encoding="utf-8")
    pack([str(tmp_path / "book.txt")], tmp_path / "out", tokenizer="bytes")
    texts = stored_texts(tmp_path / "out")
    assert texts["book.txt"] + texts["book.txt#end"] == lines.encode()
    assert texts["book.txt#end"].startswith(b"line ")
    with open_dataset(tmp_path / "out") as dataset:
        (held,) = dataset.heldout_documents()
    assert held.name == "book.txt#end" and held.data == texts["book.txt#end"]


@pytest.mark.parametrize("text", ["ab", "é€", "abc\n", "\n\n", "a\nb", "x" * 50, "é" * 9])
@pytest.mark.parametrize("tail", [1, 2, 3, 1000])
def test_split_tail_keeps_characters_whole(text: str, tail: int) -> None:
    head, rest = split_tail(text.encode(), tail)
    assert head and rest and (head + rest).decode() == text
    head.decode(), rest.decode()


def test_heldout_documents_are_read_back(tmp_path: Path) -> None:
    path = pack_small(tmp_path)
    with open_dataset(path) as dataset:
        held = list(dataset.heldout_documents())
        assert len(held) == describe(path).n_heldout >= 3
        for document in held:
            assert document.data == (tmp_path / "source" / document.name).read_bytes()
            assert dataset.tokenizer.decode_bytes(document.tokens) == document.data
            assert document.tokens.dtype == np.int64
    trained = {row["name"] for row in read_documents(path) if row["split"] == "train"}
    assert not trained & {document.name for document in held}


def test_progress_ends_complete(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 20)
    seen: list[tuple[str, int, int]] = []
    pack([str(source)], tmp_path / "out", tokenizer="bpe:300", progress=lambda *args: seen.append(args))
    total = sum(file.stat().st_size for file in source.iterdir())
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["reading", "training the tokenizer", "encoding"]
    assert seen[-1] == ("encoding", total, total)


def test_builtin_corpora() -> None:
    source = open_source("python")
    names = [name for name, _ in source.files]
    assert len(names) > 300 and "argparse.py" in names and names == sorted(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert source.licence == "PSF-2.0"
    assert {corpus.name: corpus.tokenizer for corpus in BUILTIN_CORPORA.values()} == {
        "python": "bpe:4096",
        "python-bytes": "bytes",
    }
    assert builtin_at("datasets/python") == "python" and builtin_at("/x/datasets/python-bytes/") == "python-bytes"
    assert builtin_at("mine/python") is None and builtin_at("datasets/other") is None


def test_builtin_on_demand(tmp_path: Path) -> None:
    first = pack_builtin("python-bytes", tmp_path / "datasets")
    assert not first.reused and first.manifest.train.n_bytes > 5_000_000
    second = pack_builtin("python-bytes", tmp_path / "datasets")
    assert second.reused and second.seconds < 1 and second.manifest == first.manifest
    with pytest.raises(DataError, match="not a built-in corpus"):
        pack_builtin("ruby", tmp_path)


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


def test_sources_at_addresses_pack_like_local_ones(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    source = write_folder(tmp_path / "texts", n_documents=12)
    for path in source.iterdir():
        memory.pipe_file(f"/bucket/texts/{path.name}", path.read_bytes())
    rows = [{"text": f"row {number}", "licence": "CC0-1.0"} for number in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    memory.pipe_file("/bucket/rows.jsonl", lines.encode())
    options: dict = {"tokenizer": "bytes", "licence": "MIT"}
    local = pack([str(source), str(tmp_path / "rows.jsonl")], tmp_path / "local", **options)
    remote = pack(["memory://bucket/texts", "memory://bucket/rows.jsonl"], tmp_path / "remote", **options)
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    assert pack(["memory://bucket/texts", "memory://bucket/rows.jsonl"], tmp_path / "remote", **options).reused
    listed = list(read_documents(tmp_path / "remote"))
    assert {row["licence"] for row in listed} == {"MIT", "CC0-1.0"} and {row["source"] for row in listed} == {
        "texts",
        "rows.jsonl",
    }
    with pytest.raises(DataError, match="no file is there"):
        pack(["memory://bucket/none"], tmp_path / "x", **options)
    with pytest.raises(DataError, match="not a plain address"):
        pack(["pipe::memory://bucket/texts"], tmp_path / "x", **options)


def test_parquet_at_an_address(tmp_path: Path) -> None:
    import fsspec
    import pyarrow.parquet

    texts = [f"row {number}" for number in range(7)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    fsspec.filesystem("memory").pipe_file("/bucket/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    local, remote = (open_source(spec) for spec in (str(tmp_path / "rows.parquet"), "memory://bucket/rows.parquet"))
    assert [document.text for document in remote.read()] == texts == [document.text for document in local.read()]
