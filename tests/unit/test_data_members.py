"""Tar files that attack whoever unpacks them: refused by name, packed or not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.foreign import ForeignStream
from data.members import leads_out
from data.plain_tars import contents_of
from data.verify import verify
from tests.unit.data_samples import pack_small

ATTACKS = {
    "absolute": ({"name": "/etc/cron.d/evil.txt"}, "leads out of the folder, '/etc/cron.d/evil.txt'"),
    "parent": ({"name": "a/../../evil.txt"}, "leads out of the folder"),
    "backslash": ({"name": "..\\evil.txt"}, "leads out of the folder"),
    "drive": ({"name": "C:evil.txt"}, "leads out of the folder"),
    "symbolic link": ({"name": "a.txt", "type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}, "symbolic link 'a.txt'"),
    "hard link": ({"name": "a.txt", "type": tarfile.LNKTYPE, "linkname": "b.txt"}, "hard link 'a.txt'"),
    "device": ({"name": "a.txt", "type": tarfile.CHRTYPE}, "device 'a.txt'"),
    "pipe": ({"name": "a.txt", "type": tarfile.FIFOTYPE}, "pipe 'a.txt'"),
    "sparse file": ({"name": "a.txt", "type": tarfile.GNUTYPE_SPARSE}, "sparse file 'a.txt'"),
    "extended header": ({"name": "a.txt", "pax_headers": {"path": "../" * 60 + "evil.txt"}}, "leads out of the folder"),
}


def member(fields: dict, payload: bytes = b"") -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(fields["name"])
    for key, value in fields.items():
        setattr(info, key, value)
    info.size = len(payload)
    return info, io.BytesIO(payload)


def make(path: Path, *members: dict) -> Path:
    """A tar file of a harmless sample, and these."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(*member({"name": "good.txt"}, b"a text" * 50))
        for fields in members:
            tar.addfile(*member(fields))
    return path


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_stream_gives_nothing_of_such_a_file(attack: str, tmp_path: Path) -> None:
    fields, said = ATTACKS[attack]
    make(tmp_path / "a.tar", fields)
    with pytest.raises(DataError, match=r"a\.tar: holds") as refused:
        contents_of(str(tmp_path / "a.tar"))
    assert said in str(refused.value)
    config = DataConfig(path=str(tmp_path), mode="stream", seq_len=20)
    with ForeignStream(config, 0, 1, 4, 2) as stream, pytest.raises(DataError, match="holds"):
        stream.read(0)


def test_harmless_files_and_folders_are_taken(tmp_path: Path) -> None:
    folder = {"name": "folder/", "type": tarfile.DIRTYPE}
    path = make(tmp_path / "a.tar", folder, {"name": "folder/..b/x.txt"}, {"name": "./c.txt"})
    assert contents_of(str(path)).n_txt == 3


@pytest.mark.parametrize("attack", ["symbolic link", "hard link", "device", "absolute", "parent"])
def test_verification_names_it_in_a_packed_shard(attack: str, tmp_path: Path) -> None:
    folder = pack_small(tmp_path)
    fields, said = ATTACKS[attack]
    [shard, *_] = sorted(folder.glob("train-*.tar"))
    content = io.BytesIO(shard.read_bytes())
    with tarfile.open(fileobj=content, mode="a") as tar:
        tar.addfile(*member(fields))
    shard.write_bytes(content.getvalue())
    [damage] = verify(folder)
    assert damage.file == shard.name and (said in damage.problem or "its name leads out" in damage.problem)


def test_names() -> None:
    assert all(map(leads_out, ("/a", "..", "a/..", "../a", "\\a", "a\\..\\b", "C:\\x", "a\0b")))
    assert not any(map(leads_out, ("a", "a/b", "a..b/c", "..a", "a/b:c")))
