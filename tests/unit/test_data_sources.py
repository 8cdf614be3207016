"""What packing makes of folders as people have them: every file by its kind, nothing left out without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.corpus import Source, open_source
from data.errors import DataError
from data.manifest import read_documents
from data.pack import Packed, pack
from launch.cli import main
from tests.unit.data_samples import stored_texts

pyarrow = pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[2]


def gz(data: bytes) -> bytes:
    """Without the second of its making, so that tests have the same names in every worker."""
    return gzip.compress(data, mtime=0)


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def parquet(column: list, name: str = "text", **options: object) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: column}), file, **options)
    return file.getvalue()


def zstd(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def at_memory(folder: Path, name: str) -> str:
    import fsspec

    system = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{name}"


def read(spec: Path | str, field: str = "text") -> tuple[dict[str, str], Source]:
    source = open_source(str(spec), field=field)
    return {document.name: document.text for document in source.read()}, source


def packed(source: Path | str, out: Path, **options: object) -> Packed:
    return pack([str(source)], out, **{"tokenizer": "bytes", "heldout": 0, **options})  # type: ignore[arg-type]


MIXED = {
    "a.jsonl": rows("one", "two"),
    "b/c.ndjson.gz": gzip.compress(rows("three")),
    "b/d.json": json.dumps([{"text": "four"}, {"text": "five"}], indent=1).encode(),
    "b/lines.json": rows("six", "seven"),
    "e.parquet": parquet(["eight", "nine"]),
    "code.py": b"print(1)\n",
    "package.json": b'{\n "name": "a package"\n}\n',
    "poem.txt.bz2": bz2.compress(b"a poem\n"),
    "novel.txt.xz": lzma.compress(b"a novel\n"),
    "shard.jsonl.zst": zstd(rows("ten")),
    "gzip-by-content.jsonl": gzip.compress(rows("eleven")),
    "served-as-plain.jsonl.gz": rows("twelve"),
}
TEXTS = {
    "a.jsonl:1": "one", "a.jsonl:2": "two", "b/c.ndjson.gz:1": "three", "b/d.json:1": "four", "b/d.json:2": "five",
    "b/lines.json:1": "six", "b/lines.json:2": "seven", "e.parquet:1": "eight", "e.parquet:2": "nine",
    "code.py": "print(1)\n", "package.json": '{\n "name": "a package"\n}\n', "poem.txt.bz2": "a poem\n",
    "novel.txt.xz": "a novel\n", "shard.jsonl.zst:1": "ten", "gzip-by-content.jsonl:1": "eleven",
    "served-as-plain.jsonl.gz:1": "twelve",
}  # fmt: skip


def test_every_file_of_a_folder_is_read_by_its_kind(tmp_path: Path) -> None:
    documents, source = read(write(tmp_path / "mixed", MIXED))
    assert documents == TEXTS and not source.account().left
    for name in MIXED:  # and alone, the same
        alone, _ = read(tmp_path / "mixed" / name)
        assert sorted(alone.values()) == sorted(text for key, text in TEXTS.items() if key.split(":")[0] == name), name


def test_notes_beside_data_are_no_documents(tmp_path: Path) -> None:
    """As the Hub gives a data set; in a folder of code README and LICENSE are documents as any other."""
    hub = {
        "README.md": b"# card\n",
        "LICENSE": b"free\n",
        "dataset_infos.json": b"{}\n",
        "data/x.parquet": parquet(["a"]),
    }
    documents, source = read(write(tmp_path / "hub", hub))
    assert documents == {"data/x.parquet:1": "a"}
    (left,) = source.left.reasons.values()
    assert left.names == ["LICENSE", "README.md", "dataset_infos.json"] and source.licence == "see LICENSE"
    spark = {"_SUCCESS": b"", "_common_metadata": parquet([])[:-9], "part-0.snappy.parquet": parquet(["a"])}
    assert set(read(write(tmp_path / "spark", spark))[0]) == {"part-0.snappy.parquet:1"}
    array = {"README.md": b"# card\n", "rows.json": b'[{"text": "a"}]', "doc/README.md": b"of the program\n"}
    assert set(read(write(tmp_path / "array", array))[0]) == {"rows.json:1", "doc/README.md"}
    code = {"README.md": b"# program\n", "LICENSE": b"free\n", "main.py": b"pass\n", "package.json": b'{"text": 1}'}
    code["package.json"] = b'{"name": "x"}'
    assert set(read(write(tmp_path / "code", code))[0]) == set(code)


def test_a_folder_gives_the_same_data_set_here_and_at_an_address(tmp_path: Path) -> None:
    odd = {
        ".git/config": b"x", ".git/refs/y": b"y", "a/.hidden": b"z", "a/__pycache__/m.pyc": b"\0", "README.md": b"card",
        "LICENSE": b"free", "latin.txt": b"caf\xe9", "empty.txt": b"", "pic.png": b"\x89PNG\0",
        "z.zip": b"PK\x03\x04\0",
        "bom.txt": b"\xef\xbb\xbftext", "wide.txt": "wide".encode("utf-16"),
        "dull.jsonl": b'{"text": null}\n{"text": "\\u0000"}\n{"text": ""}\n',
    }  # fmt: skip
    folder = write(tmp_path / "same", {**MIXED, **odd})
    address = at_memory(folder, f"{tmp_path.name}/same")
    one, two = packed(folder, tmp_path / "one"), packed(address, tmp_path / "two")
    three = packed(f"local://{folder}", tmp_path / "three")
    assert one.manifest == two.manifest == three.manifest
    for other in (two, three):
        assert [account.to_json() for account in one.accounts] == [account.to_json() for account in other.accounts]
    for name in ("documents.jsonl", "train-00000.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    left = {reason: entry.names for reason, entry in one.accounts[0].left.reasons.items()}
    assert left == {
        "hidden": [".git/", "a/.hidden"],
        "__pycache__": ["a/__pycache__/"],
        "a note beside data (README, licence, card)": ["LICENSE", "README.md"],
        "field text is null": ["dull.jsonl:1"],
        "unknown binary format": ["dull.jsonl:2"],
        "empty": ["dull.jsonl:3", "empty.txt"],
        "not UTF-8 text": ["latin.txt"],
        "picture, sound, font or program": ["pic.png"],
        "UTF-16 text": ["wide.txt"],
        "zip archive, which is not read": ["z.zip"],
    }
    assert one.accounts[0].changed.reasons["byte-order mark removed"].names == ["bom.txt"]
    assert stored_texts(tmp_path / "one")["bom.txt"] == b"text"


@pytest.mark.parametrize("seed", range(6))
def test_generated_folders_lose_nothing_and_are_the_same_everywhere(tmp_path: Path, seed: int) -> None:
    """Rows and texts in all forms under random names: each text is there once, or its file is named."""
    draw = random.Random(seed)
    expected: list[str] = []
    named: set[str] = set()
    folder = tmp_path / "generated"
    for number in range(draw.randint(8, 25)):
        texts = [f"{seed} {number} {n} {draw.choice(['é', '数', '🙂', 'a b', ' x'])}" for n in range(3)]
        kind = draw.choice(["txt", "jsonl", "json", "array", "parquet", "large", "binary", "latin", "zip", "tar"])
        place = "/".join(draw.choice(["a", "b c", "ü"]) for _ in range(draw.randint(0, 2)))
        suffix = {"array": "json", "large": "parquet", "binary": "parquet", "latin": "txt"}.get(kind, kind)
        name = f"{place}/{number}.{suffix}".lstrip("/")
        if kind in ("jsonl", "json"):
            content = rows(*texts)
        elif kind == "array":
            content = json.dumps([{"text": text} for text in texts], ensure_ascii=draw.random() < 0.5).encode()
        elif kind in ("parquet", "large", "binary"):
            column = [text.encode() for text in texts] if kind == "binary" else texts
            content = parquet(column, compression=draw.choice(["snappy", "zstd", "gzip"]))
        elif kind == "latin":
            content = b"\xe9 latin"
        elif kind == "zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("x.txt", texts[0])
            content = buffer.getvalue()
        elif kind == "tar":
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                tar.addfile(tarfile.TarInfo("x.txt"))
            content = buffer.getvalue()
        else:
            texts = texts[:1]
            content = texts[0].encode()
        packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
        ending = draw.choice(list(packers))
        content = packers[ending](content)
        name += ending if draw.random() < 0.7 else ""  # and compressed without saying so
        write(folder, {name: content})
        if kind in ("latin", "zip", "tar"):
            named.add(name)
        else:
            expected += texts
    documents, source = read(folder)
    assert sorted(documents.values()) == sorted(expected)
    assert {name for left in source.left.reasons.values() for name in left.names} == named
    remote, other = read(at_memory(folder, f"{tmp_path.name}/generated"))
    assert remote == documents and other.account().to_json() == source.account().to_json()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_of_any_kind_end_in_documents_or_one_sentence(tmp_path: Path, seed: int) -> None:
    """Files of every kind, wrapped, flipped and cut under random suffixes; the same here and at an address."""
    draw = random.Random(seed)
    encodings = ["utf-8", "latin-1", "utf-16", "utf-8-sig", "utf-32"]
    odd = [[1, 2], ["a"], {"a": 1}, None, 5, [[]], [{}], [{"text": 1}], {"text": "t"}, {"text": None}]
    magic = [b"PK\3\4", b"ARROW1", b"%PDF-1", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PAR1"]
    kinds = [
        lambda: draw.randbytes(draw.randrange(60)), lambda: json.dumps([{"text": "a"}, {"text": "b"}]).encode(),
        lambda: rows("x", "y"), lambda: parquet(["p", "q"]), lambda: b"", lambda: b'[{"text": "a"} {"text"',
        lambda: "héllo wörld\n".encode(draw.choice(encodings)), lambda: json.dumps(draw.choice(odd)).encode(),
        lambda: draw.choice(magic) + draw.randbytes(20),
    ]  # fmt: skip

    def changed(raw: bytes) -> bytes:
        place = draw.randrange(len(raw) + 1)
        return draw.choice([
            gzip.compress, bz2.compress, lzma.compress, zstd, lambda raw: raw[:place],
            lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw[:place] + draw.randbytes(1) + raw[place + 1 :],
        ])(raw)  # fmt: skip

    suffixes = ["txt", "json", "jsonl", "parquet", "json.gz", "jsonl.zst", "txt.xz", "tar", "zip", "png", "arrow", "x"]
    seen = set()
    for number in range(40):
        files = {}
        for one in range(draw.randint(1, 3)):
            raw = draw.choice(kinds)()
            for _ in range(draw.randrange(3)):
                raw = changed(raw)
            files[f"{one}.{draw.choice(suffixes)}"] = raw
        folder = write(tmp_path / str(number), files)
        results = []
        for spec in (str(folder), at_memory(folder, f"{tmp_path.name}/{number}")):
            try:
                documents, source = read(spec)
                results.append((documents, source.account().to_json()))
            except DataError as error:
                results.append(str(error).replace(spec, ""))
        assert results[0] == results[1], files
        seen.add(type(results[0]))
    assert seen == {tuple, str}


def test_more_left_out_than_read_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"))
    cases = {
        "licence": ({"LICENSE": b"free " * 900, "x.tar.gz": buffer.getvalue()}, "notes on data.*x.tar.gz"),
        "arrow": ({"README.md": b"card " * 900, "data.arrow": b"ARROW1\0\0" + bytes(90)}, "Arrow file.*data.arrow"),
        "latin": ({"a.txt": b"ascii", "b.txt": b"caf\xe9 " * 9}, "not UTF-8 text: 1 .*b.txt"),
        "field": ({"a.txt": b"text", "b.json": b'[{"content": "long"}]'}, "without the field text.*b.json"),
        "pointer": ({"a.txt": b"x", "b.txt": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS.*b.txt"),
    }  # fmt: skip
    for name, (files, message) in cases.items():
        folder = write(tmp_path / name, files)
        with pytest.raises(DataError, match=f"{message}.*--allow-left-out"):
            packed(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        allowed = packed(folder, tmp_path / f"{name}-out", allow_left_out=True)
        assert "warning: " in str(allowed) and allowed.manifest.train.n_documents == 1
    pictures = write(tmp_path / "pictures", {"a.txt": b"text", "b.png": b"\x89PNG\0" * 50})
    assert "warning: source pictures: 250 bytes were left out, 4 bytes read" in str(packed(pictures, tmp_path / "p"))
    for name, content in {"x.zip": b"PK\x03\x04\0", "x.7z": b"7z\xbc\xaf\x27\x1c", "x.bin": b"\0\1"}.items():
        write(tmp_path / "alone", {name: content})
        with pytest.raises(DataError, match=f"hold no text.*{name}"):
            packed(tmp_path / "alone" / name, tmp_path / "out")


def test_names_are_bounded_and_shown(tmp_path: Path) -> None:
    files = {f"{number:02d}.txt": b"caf\xe9" for number in range(30)}
    folder = write(tmp_path / "many", {**files, "good.txt": b"text " * 99, "bad\nname\x1b.txt": b"\xe9"})
    report = packed(folder, tmp_path / "out")
    line = next(line for line in str(report).splitlines() if "not UTF-8" in line)
    assert line.startswith("  left out, not UTF-8 text: 31 (121 bytes): 00.txt, 01.txt") and "and 26 more" in line
    assert "\x1b" not in str(report) and len(report.accounts[0].left.reasons["not UTF-8 text"].names) == 10
    again = packed(folder, tmp_path / "out")
    assert again.reused and str(again).splitlines()[1:] == str(report).splitlines()[1:]


def test_names_of_any_bytes_are_packed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "names")
    os.mkdir(folder)
    names = [b"caf\xe9.txt", b"caf\\xe9.txt", b"line\nend.txt", "ü\u2028.txt".encode(), b"\xff.jsonl"]
    for number, name in enumerate(names):
        with open(folder + b"/" + name, "wb") as file:
            file.write(rows(f"text {number}") if name.endswith(b"jsonl") else f"text {number}".encode())
    packed(tmp_path / "names", tmp_path / "out", heldout=0.4, heldout_kib=1)
    texts = {row["name"] for row in read_documents(tmp_path / "out")}
    assert texts == {"caf\\xe9.txt", "caf\\xe9.txt #2", "line\nend.txt", "ü\u2028.txt", "\\xff.jsonl:1"}
    assert sorted(stored_texts(tmp_path / "out").values()) == [f"text {number}".encode() for number in range(5)]
    os.mkdir(folder + b"/caf\xe9")
    with open(folder + b"/caf\xe9/x.txt", "wb") as file:
        file.write(b"y")
    inside = os.fsdecode(folder + b"/caf\xe9")
    assert packed(inside, tmp_path / "inside").manifest.sources[0].name == "caf\\xe9"


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, {"src/a/1.txt": b"one", "src/b/2.txt": b"two", "far/3.txt": b"three", "far/deep/4.txt": b"four"})
    for name, target in {
        "src/far": tmp_path / "far", "src/again": tmp_path / "far/deep", "src/self": tmp_path / "src", "src/up": "..",
        "src/a/loop": "loop", "src/a/linked.txt": "../b/2.txt", "src/nowhere.txt": "missing",
    }.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    (tmp_path / "src" / "pipe").touch()
    (tmp_path / "src" / "pipe").unlink()
    os.mkfifo(tmp_path / "src" / "pipe")
    documents, source = read(tmp_path / "src")
    assert set(documents.values()) == {"one", "two", "three", "four"}
    assert documents["a/1.txt"] == "one" and documents["a/linked.txt"] == "two"
    left = {reason: entry.names for reason, entry in source.account().left.reasons.items()}
    assert left["link to nothing"] == ["a/loop", "nowhere.txt"] and left["not a regular file"] == ["pipe"]
    assert left["link to a folder that the source lies in"] == ["up"]
    assert left["link to a folder that is read already"] == ["far/deep", "self"]  # src/again came first
    assert source.account().changed.reasons["link to a folder, followed"].names == ["again", "far"]


def test_what_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    """Root reads everything, so a process without that right does it, where there is one to start."""
    write(tmp_path, {"a/1.txt": b"one", "a/secret/2.txt": b"two", "b/1.txt": b"x", "b/2.jsonl": rows("two")})
    (tmp_path / "a" / "secret").chmod(0)
    (tmp_path / "b" / "2.jsonl").chmod(0)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nfrom data.corpus import open_source\n"
        "from data.errors import DataError\n"
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if os.geteuid() == 0:\n    os.chdir('/'); libc.prctl(8, 1); \n"
        "    class C(ctypes.Structure): _fields_ = [('v', ctypes.c_uint32), ('p', ctypes.c_int)]\n"
        "    libc.capset(ctypes.byref(C(0x20080522, 0)), (ctypes.c_uint32 * 6)())\n"
        "for spec in sys.argv[2:]:\n"
        "    try: print([d.name for d in open_source(spec).read()])\n"
        "    except DataError as error: print(error)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(ROOT), *(str(tmp_path / name) for name in ("a", "b", "b/2.jsonl"))],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        (tmp_path / "a" / "secret").chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "secret: the folder cannot be read (Permission denied)" in lines[0]
    assert all("2.jsonl: cannot be read (Permission denied)" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", rows("ok") + b'{"text": ' + b"[" * 100_000 + b"\n", r"deep\.jsonl, line 2: .*nested too deep"),
        ("deep.json", b'[{"text": "a"}, {"text": ' + b"[" * 100_000, r"deep\.json, row 2: .*nested too deep"),
        ("cut.jsonl", rows("ok") + b'{"text": "b', r"cut\.jsonl, line 2: is not a JSON object in UTF-8"),
        ("cut.json", b'[{"text": "a"}, {"text": "b"}', r"cut\.json, row 2: .*cut off"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', r"latin\.jsonl, line 1: .*UTF-8"),
        ("list.jsonl", b"[1, 2]\n", r"list\.jsonl, line 1: is a JSON array, not an object"),
        ("null.json", b'[{"text": "a"}, null]', r"null\.json, row 2: is a JSON null, not an object"),
        ("other.jsonl", b'{"id": 1, "content": "a"}\n', r"no field text; its fields are id, content; .*--field NAME"),
        ("late.json", b'[{"text": "a"}, {"body": 1}]', r"row 2: has no field text; its fields are body"),
        ("cut.jsonl.gz", gz(rows("a" * 999, "b" * 999))[:-9], r"cut\.jsonl\.gz: its compression is dam"),
        ("cut.txt.xz", lzma.compress(os.urandom(999).hex().encode())[:-30], r"cut\.txt\.xz: its compression is dam"),
        ("cut.txt.bz2", bz2.compress(os.urandom(999).hex().encode())[:-30], r"cut\.txt\.bz2: its compression is dam"),
        ("cut.txt.zst", zstd(os.urandom(999).hex().encode())[:-30], r"cut\.txt\.zst: cannot be read"),
        ("flip.txt.gz", gz(b"hello " * 99)[:-8] + bytes(8), r"flip\.txt\.gz: its compression is dam"),
        ("zero.parquet", b"", r"zero\.parquet: is not a readable Parquet file"),
        ("half.parquet", parquet(["a" * 99])[:-50], r"half\.parquet: is not a readable Parquet file"),
        ("ints.parquet", parquet([1, 2]), r"ints\.parquet: the column text holds int64, not text.*--field"),
        ("lists.parquet", parquet([["a"], ["b"]]), r"lists\.parquet: the column text holds list<.*>, not text"),
        ("names.parquet", parquet(["a"], "content"), r"no field text; its columns are content; .*--field"),
    ],
)  # fmt: skip
def test_damaged_files_end_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path / "source", {name: content, "good.txt": b"good"})
    for spec in (tmp_path / "source", at_memory(tmp_path / "source", f"{tmp_path.name}/damaged")):
        with pytest.raises(DataError, match=message):
            packed(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_storage_that_breaks_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    class PayloadError(Exception):
        """Of a library of its own, as aiohttp's ClientPayloadError is."""

    def broken(self: object, *_: object) -> bytes:
        raise PayloadError("not enough data")

    address = at_memory(write(tmp_path / "far", {"a.jsonl": rows("one")}), f"{tmp_path.name}/far")
    monkeypatch.setattr(MemoryFile, "readinto", broken)
    with pytest.raises(DataError, match=r"far/a\.jsonl: cannot be read \(PayloadError\('not enough data'\)\)"):
        read(f"{address}/a.jsonl")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read \\(File name too long\\)"):
        open_source(str(tmp_path / ("x" * 300)))


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path) -> None:
    raw = bytearray(parquet([f"row {number} " * 30 for number in range(4000)], row_group_size=1000))
    place = raw.index(b"row 2") if b"row 2" in raw else len(raw) // 2
    raw[place + 200 : place + 2000] = bytes(reversed(raw[place + 200 : place + 2000]))
    write(tmp_path, {"pages.parquet": bytes(raw)})
    with pytest.raises(DataError, match=r"pages\.parquet, row group \d, after row \d+: is damaged"):
        read(tmp_path / "pages.parquet")


def test_binary_columns_and_other_fields(tmp_path: Path) -> None:
    write(tmp_path, {"spark.parquet": parquet([b"caf\xc3\xa9", b"\xe9", None, b"x"])})
    documents, source = read(tmp_path / "spark.parquet")
    assert documents == {"spark.parquet:1": "café", "spark.parquet:4": "x"}
    assert source.left.counts() == {"field text is null": 1, "not UTF-8 text": 1}
    files = {
        "a.jsonl": b'{"content": "one"}\n',
        "b.parquet": parquet(["two"], "content"),
        "c.json": b'[{"content": "3"}]',
    }
    documents, _ = read(write(tmp_path / "fields", files), field="content")
    assert documents == {"a.jsonl:1": "one", "b.parquet:1": "two", "c.json:1": "3"}


def test_a_field_for_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path, {"a/a.jsonl": b'{"content": "one"}\n', "b/b.jsonl": b'{"body": "two"}\n', "c/c.jsonl": rows("three")}
    )
    command = ["data", "pack", "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--heldout", "0"]
    for name in "abc":
        command += ["--source", f"{name}={tmp_path / name}"]
    assert main([*command, "--field", "a=content", "--field", "body"]) == 2
    assert "c.jsonl, line 1: has no field body" in capsys.readouterr().err
    command += ["--field", "a=content", "--field", "b=body"]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.count("reused") == 1
    assert [stored_texts(tmp_path / "out" / name) for name in "abc"] == [
        {"a.jsonl:1": b"one"}, {"b.jsonl:1": b"two"}, {"c.jsonl:1": b"three"},
    ]  # fmt: skip


def test_a_hub_folder_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "README.md": b"# card\n",
        "a.jsonl": b'{"content": "one"}\n{"content": "two"}\n',
        "photo.jpg": b"\xff\xd8\xff\0",
    }
    folder = write(tmp_path / "hub", files)
    command = ["data", "pack", str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(command) == 2
    assert "its fields are content; give the text's with --field NAME" in capsys.readouterr().err
    assert main([*command, "--field", "content", "--json"]) == 0
    printed, told = capsys.readouterr()
    assert "left out, a note beside data (README, licence, card): 1 (7 bytes): README.md" in told
    figures = json.loads(printed)
    (account,) = figures["sources"]
    assert account["documents"] == 2 and account["left_out"]["picture, sound, font or program"]["names"] == [
        "photo.jpg"
    ]
    assert main([*command, "--field", "content"]) == 0 and "reused" in capsys.readouterr().out
