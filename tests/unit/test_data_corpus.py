"""What packing takes from its sources: which documents, from where, what is left out and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.builtin import BUILTIN_CORPORA
from data.corpus import open_source
from data.dataset import describe, open_dataset
from data.errors import DataError
from data.heldout import choose_heldout, split_tail
from data.manifest import read_documents
from data.pack import builtin_at, pack, pack_builtin
from tests.unit.data_samples import pack_small, stored_texts, write_folder


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
    assert manifest.sources[0].skipped == {
        "empty": 1,
        "not UTF-8 text": 1,
        "picture, sound, font or program": 1,
    }
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
    more = choose_heldout([*((f"new{i}", 900) for i in range(20)), *sizes], 0.02, 1 << 20).names
    assert len(chosen & more) >= 17
    capped = choose_heldout(sizes, 0.02, 5000).names
    assert 3 <= len(capped) <= 4 and sum(dict(sizes)[name] for name in capped) <= 5000
    assert len(choose_heldout(sizes[:10], 0.02, 1 << 20).names) == 3
    assert choose_heldout(sizes, 0.0, 1 << 20).names == frozenset()
    alone = choose_heldout([("book", 1_000_000)], 0.02, 256 << 10)
    assert (alone.names, alone.tail, alone.tail_bytes) == (frozenset(), "book", 20_000)


def test_the_tokenizer_learns_nothing_from_what_is_held_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    names = [f"{number:02d}.txt" for number in range(20)]
    held = choose_heldout([(name, 2000) for name in names], 0.02, 256 << 10).names
    (tmp_path / "source").mkdir()
    for name in names:
        text = name + ("zq " if name in held else "word ") * 1000
        (tmp_path / "source" / name).write_text(text[:2000])
    (tmp_path / "book.txt").write_text("word\n" * 3000 + "zq\n" * 60)  # of one document the end is held out
    for source, out in ((tmp_path / "source", tmp_path / "many"), (tmp_path / "book.txt", tmp_path / "one")):
        pack([str(source)], out, tokenizer="bpe:300", heldout_kib=0.25 if out.name == "one" else 256)
        with open_dataset(out) as dataset:
            assert all(b"zq" in document.data for document in dataset.heldout_documents())
        vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
        assert any("word" in token for token in vocabulary) and not any("zq" in token for token in vocabulary)


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
    assert second.reused and second.manifest == first.manifest
    with pytest.raises(DataError, match="not a built-in corpus"):
        pack_builtin("ruby", tmp_path)


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
