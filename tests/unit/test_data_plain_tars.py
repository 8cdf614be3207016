"""Tar files of other people: every `*.txt` is a document, and what would stop a run is found before it, by name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.foreign import ForeignStream
from data.plain_tars import contents_of, documents, plain_tars, survey, total


def write(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w", **options: int) -> Path:
    """A tar file of these members, in their order."""
    pairs = list(members.items()) if isinstance(members, Mapping) else members
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        for name, payload in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def texts(path: Path) -> list[str]:
    return [found.text for found in documents(str(path), contents_of(str(path))) if found.text is not None]


def refused(*files: Path) -> str:
    with pytest.raises(DataError) as caught:
        survey([str(file) for file in files])
    return str(caught.value)


GOOD = {"good.txt": b"a good text"}


def test_every_txt_is_a_document_whatever_its_dots_folders_and_case(tmp_path: Path) -> None:
    names = ["www.example.org.1.txt", "www.example.org.2.txt", "crawl/arxiv:2401.00001.txt", "a.b/c.txt", "D.TXT",
             ".hidden.txt", ".txt", "x.en.txt", "n" * 150 + ".txt", "ü/" * 80 + "é.txt"]  # fmt: skip
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write(tmp_path / "a.tar", {name: name.encode() for name in names}, format=form)
        contents = survey([str(path)])[str(path)]
        assert texts(path) == names and contents.n_txt == contents.n_members == len(names)


def test_json_gives_its_text_unless_a_txt_of_its_name_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {
        "1.json": json.dumps({"text": "of 1"}).encode(), "v.2.json": json.dumps({"text": "metadata"}).encode(),
        "3.json": b'{"url": "x"}', "4.json": b"[1", "5.json": b'{"text": "\\ud800"}', "v.2.txt": b"of 2",
        "6.txt": b"caf\xe9", "7.txt": b" \n", "8.jpg": b"", "README": b"",
    })  # fmt: skip
    contents = contents_of(str(path))
    read = list(documents(str(path), contents))
    assert [(one.name, one.text) for one in read if one.text] == [("1.json", "of 1"), ("v.2.txt", "of 2")]
    assert [one.left_out for one in read if one.text is None] == [
        "json without a field text", "json without a field text", "not UTF-8 text", "not UTF-8 text", "empty",
    ]  # fmt: skip
    assert dict(contents.others) == {".json beside .txt": 1, ".jpg": 1, "without a suffix": 1}
    assert contents.n_members == contents.n_candidates + contents.others.total() == 10


def test_all_of_one_kind_first_is_read_too(tmp_path: Path) -> None:
    pairs = [(f"{n}.json", b'{"text": "metadata"}') for n in range(5)] + [(f"{n}.txt", b"%d" % n) for n in range(5)]
    assert texts(write(tmp_path / "a.tar", pairs)) == list("01234")


def test_a_name_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    for again in ("99.txt", "./99.txt"):
        path = write(tmp_path / "a.tar", {"99.txt": b"old", "98.txt": b"x"})
        write(path, {again: b"corrected"}, "a")  # as `tar -r` does
        said = refused(path)
        assert f"a.tar: holds the member {again} twice, at byte 0 and at byte 2048" in said and "unpack" in said
    path = write(tmp_path / "a.tar", [("a.txt", b"x"), ("a.png", b""), ("a.png", b"")])
    assert texts(path) == ["x"]  # what nobody reads may be there twice


def test_damaged_files_are_all_named_before_a_text_is_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", {f"{n}.txt": b"x" * 700 for n in range(4)}).read_bytes()
    cases = {
        "zero.tar": (b"", "zero.tar is 0 bytes long"),
        "header.tar": (whole[: 1536 + 100], "header.tar: the file ends inside the tar header at byte 1536"),
        "member.tar": (whole[: 1536 + 600], "member.tar: the file is cut or damaged in or behind the member 1.txt"),
        "between.tar": (whole[:1536], "between.tar: the file ends without the archive's closing blocks"),
        "flipped.tar": (whole[:1540] + b"#" + whole[1541:], "flipped.tar: the tar header at byte 1536 is damaged"),
        "joined.tar": (whole + whole, "joined.tar: the archive is closed at byte 6144, but more data follows"),
        "cut.tar.gz": (gzip.compress(whole)[:-20], "cut.tar.gz"),
        "crc.tar.gz": (gzip.compress(whole)[:-8] + b"\0" * 8, "crc.tar.gz"),
        "page.tar": (b"<html>not found</html>" * 100, "page.tar is not a tar file"),
    }
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
    for name, (_, said) in cases.items():
        assert said in refused(tmp_path / "whole.tar", tmp_path / name) and "fetch it again" in refused(tmp_path / name)
    together = refused(*(tmp_path / name for name in ("whole.tar", *cases)))
    assert all(name in together for name in cases) and "whole.tar" not in together
    (tmp_path / "lone.tar").write_bytes(whole[:6656])  # one closing block is an end
    survey([str(tmp_path / "lone.tar"), str(write(tmp_path / "b.tar.gz", GOOD, "w:gz"))])


def test_empty_archives_are_taken_and_counted_and_nothing_at_all_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / "0.tar", {}), write(tmp_path / "1.tar", GOOD), write(tmp_path / "2.tar", {})]
    found = total(survey([str(file) for file in files]).values())
    assert found.empty == [str(files[0]), str(files[2])] and found.n_txt == 1
    with ForeignStream(DataConfig(path=str(tmp_path), mode="stream", seq_len=20), 0, 1, 2, 2) as stream:
        for step in range(20):
            stream.read(step)
    assert "no sample has a member txt" in refused(files[0])
    said = refused(write(tmp_path / "3.tar", {"a.png": b"", "b.txt": b"", "c.json": b"{}"}))
    assert "1 .png" in said and "1 empty" in said and "1 json without a field text" in said


def test_a_folder_says_what_it_does_not_read(tmp_path: Path) -> None:
    for name in ("README.md", "a.tar.idx"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match=r"no tar file there \(it holds README.md, a.tar.idx, more\)"):
        plain_tars(str(tmp_path))
    write(tmp_path / "a.tar", GOOD)
    write(tmp_path / "b.tgz", GOOD, "w:gz")
    files, others = plain_tars(str(tmp_path))
    assert [Path(file).name for file in files] == ["a.tar", "b.tgz"]
    assert [Path(name).name for name in others] == ["README.md", "a.tar.idx", "more"]
    (tmp_path / "c.tar.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"c\.tar\.zst: this compression is not read"):
        plain_tars(str(tmp_path))
    (tmp_path / "c.tar.zst").unlink()
    (tmp_path / "d.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(DataError, match=r"d\.tar is no file, or a link to nothing"):
        plain_tars(str(tmp_path))


def test_a_file_that_changes_while_training_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {f"{n}.txt": b"x" * 3000 for n in range(40)})
    with ForeignStream(DataConfig(path=str(path), mode="stream", seq_len=20), 0, 1, 2, 2) as stream:
        stream.read(0)
        path.write_bytes(path.read_bytes()[:20000])
        with pytest.raises(DataError, match=r"a\.tar: .*member \d+\.txt"):
            for step in range(1, 10_000):
                stream.read(step)
