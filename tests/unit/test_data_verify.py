"""Verification finds every kind of damage and names the samples that it loses."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.dataset import open_dataset
from data.errors import DataError
from data.manifest import read_documents, read_manifest
from data.verify import Damage, verify
from tests.unit.data_samples import pack_small
from tests.unit.flaky_server import Server

SHARD = "train-00001.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def places(folder: Path, shard: int = 1) -> list[tuple[str, int, int]]:
    """(key, payload offset, payload bytes) of a training shard's samples."""
    with open_dataset(folder) as dataset:
        return [
            (dataset.train.key(shard, row), int(record["offset"]), int(record["nbytes"]))
            for row, record in enumerate(dataset.train.records(shard))
        ]


def rewrite(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(offset: int) -> Callable[[bytearray], bytearray]:
    def change(content: bytearray) -> bytearray:
        content[offset] ^= 0x55
        return content

    return change


def only(found: list[Damage], file: str = SHARD) -> Damage:
    assert [damage.file for damage in found] == [file], [str(damage) for damage in found]
    return found[0]


def lost_keys(damage: Damage) -> list[str]:
    return [sample.key for sample in damage.lost]


def test_a_whole_dataset_has_no_damage(packed: Path) -> None:
    seen = []
    assert verify(packed, lambda *args: seen.append(args)) == []
    assert seen[-1][1] == seen[-1][2] > 0


def test_cut_at_a_member_boundary(folder: Path) -> None:
    samples = places(folder)
    cut = samples[3][1] - 512
    rewrite(folder / SHARD, lambda content: content[:cut])
    damage = only(verify(folder))
    assert "bytes instead of" in damage.problem and "without the archive's closing blocks" in damage.problem
    assert lost_keys(damage) == [key for key, _, _ in samples[3:]]
    names = {row["key"]: row["name"] for row in read_documents(folder)}
    assert [sample.name for sample in damage.lost] == [names[key] for key, _, _ in samples[3:]]
    assert f"sample {samples[3][0]} ({names[samples[3][0]]}): cut off, 0 of" in str(damage)


def test_cut_inside_a_header(folder: Path) -> None:
    samples = places(folder)
    rewrite(folder / SHARD, lambda content: content[: samples[2][1] - 300])
    damage = only(verify(folder))
    assert "ends inside a tar header" in damage.problem
    assert lost_keys(damage) == [key for key, _, _ in samples[2:]]


def test_cut_inside_a_payload(folder: Path) -> None:
    samples = places(folder)
    rewrite(folder / SHARD, lambda content: content[: samples[-1][1] + 5])
    damage = only(verify(folder))
    assert "ends inside the member" in damage.problem and lost_keys(damage) == [samples[-1][0]]


def test_cut_before_the_closing_blocks(folder: Path) -> None:
    _, offset, nbytes = places(folder)[-1]
    rewrite(folder / SHARD, lambda content: content[: offset + nbytes + -nbytes % 512])
    damage = only(verify(folder))
    assert "closing blocks" in damage.problem and damage.lost == ()


@pytest.mark.parametrize("place", [3, 103, 130, 150])  # in the name, the mode, the size, the checksum itself
def test_one_wrong_byte_in_a_header(folder: Path, place: int) -> None:
    key, offset, _ = places(folder)[1]
    rewrite(folder / SHARD, flip(offset - 512 + place))
    damage = only(verify(folder))
    assert "wrong sha256" in damage.problem and "header is damaged" in damage.problem
    assert lost_keys(damage) == [key] and "all samples behind it" in damage.lost[0].problem


def test_one_flipped_bit_in_a_payload(folder: Path) -> None:
    key, offset, _ = places(folder)[4]
    rewrite(folder / SHARD, flip(offset + 3))
    damage = only(verify(folder))
    assert lost_keys(damage) == [key] and "wrong checksum" in damage.lost[0].problem


def test_an_empty_file(folder: Path) -> None:
    samples = places(folder)
    rewrite(folder / SHARD, lambda content: b"")
    damage = only(verify(folder))
    assert "the file is empty" in damage.problem and len(damage.lost) == len(samples)


def test_an_empty_archive(folder: Path) -> None:
    rewrite(folder / SHARD, lambda content: bytes(len(content)))
    damage = only(verify(folder))
    assert "no sample" in damage.problem and len(damage.lost) == len(places(folder))


def test_a_missing_shard(folder: Path) -> None:
    n_samples = len(places(folder))
    (folder / SHARD).unlink()
    damage = only(verify(folder))
    assert damage.problem == "is missing" and len(damage.lost) == n_samples


def test_duplicate_keys_and_names_that_lead_out(folder: Path) -> None:
    samples = places(folder)

    def append(content: bytearray) -> bytes:
        out = io.BytesIO(bytes(content))
        with tarfile.open(fileobj=out, mode="a") as tar:
            for name in (f"{samples[0][0]}.tok", "../../evil.tok"):
                member = tarfile.TarInfo(name)
                member.size = 4
                tar.addfile(member, io.BytesIO(b"evil"))
        return out.getvalue()

    rewrite(folder / SHARD, append)
    damage = only(verify(folder))
    assert f"holds the member {samples[0][0]}.tok 2 times" in damage.problem
    assert "'../../evil.tok' that was not packed (its name leads out of the folder" in damage.problem
    assert damage.lost == ()


def test_a_shard_copied_over_another(folder: Path) -> None:
    n_samples = len(places(folder))
    shutil.copy(folder / "train-00000.tar", folder / SHARD)
    damage = only(verify(folder))
    assert "was not packed" in damage.problem and len(damage.lost) == n_samples


def test_a_shard_that_the_manifest_does_not_list(folder: Path) -> None:
    shutil.copy(folder / "train-00000.tar", folder / "train-00099.tar")
    assert "does not list it" in only(verify(folder), "train-00099.tar").problem


def test_a_stale_index(folder: Path) -> None:
    shutil.copy(folder / "train-00000.idx", folder / "train-00001.idx")
    assert "stale" in only(verify(folder), "train-00001.idx").problem
    samples = places_without_index = [row["key"] for row in read_documents(folder) if row["split"] == "train"]
    first = read_manifest(folder).train.shards[0].n_documents
    rewrite(folder / SHARD, lambda content: content[: len(content) // 2])
    found = {damage.file: damage for damage in verify(folder)}
    assert set(found) == {SHARD, "train-00001.idx"}
    lost = lost_keys(found[SHARD])
    assert lost and lost == places_without_index[samples.index(lost[0]) : first + len(places_of(folder))]
    assert "no index to look further" in found[SHARD].lost[0].problem


def places_of(folder: Path, shard: int = 1) -> range:
    return range(read_manifest(folder).train.shards[shard].n_documents)


@pytest.mark.parametrize("content", [None, b"short", b"TRIMIDX\0" + bytes(200)])
def test_a_damaged_index(folder: Path, content: bytes | None) -> None:
    path = folder / "train-00000.idx"
    path.unlink() if content is None else path.write_bytes(content)
    assert only(verify(folder), "train-00000.idx").lost == ()


def test_damaged_side_files(folder: Path) -> None:
    rewrite(folder / "tokenizer.json", lambda content: content + b" ")
    rewrite(folder / "documents.jsonl", lambda content: content[: len(content) // 2])
    assert [damage.file for damage in verify(folder)] == ["tokenizer.json", "documents.jsonl"]
    rewrite(folder / SHARD, flip(places(folder)[0][1]))
    assert [damage.file for damage in verify(folder)] == ["tokenizer.json", "documents.jsonl", SHARD]
    rewrite(folder / "manifest.json", lambda content: content.replace(b'"eod_id": 256', b'"eod_id": 255'))
    assert "changed after packing" in only(verify(folder), "manifest.json").problem


def test_a_held_out_text_that_is_lost(folder: Path) -> None:
    with open_dataset(folder) as dataset:
        record = dataset.heldout.records(0)[0]
        key = dataset.heldout.key(0, 0)
    text_header = int(record["offset"]) + int(record["nbytes"]) + -int(record["nbytes"]) % 512
    rewrite(folder / "heldout-00000.tar", flip(text_header + 3))
    damage = only(verify(folder), "heldout-00000.tar")
    assert lost_keys(damage) == [key] and "raw text" in damage.lost[0].problem


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        verify(tmp_path / "none")
    with pytest.raises(DataError, match="is empty"):
        verify(tmp_path)


def findings(path: Path | str) -> list[tuple[str, str, list[str]]]:
    found = verify(path, deadline_s=4)
    return [(damage.file, damage.problem, [str(sample) for sample in damage.lost]) for damage in found]


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_an_address_is_verified_like_a_folder(folder: Path, kind: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    served = Server(folder) if kind == "http" else None
    address = served.address if served else f"memory://verify-{folder.parent.name}"

    def upload() -> str:
        if not served:
            memory = fsspec.filesystem("memory")
            if memory.exists(address):
                memory.rm(address, recursive=True)
            for path in folder.iterdir():
                memory.pipe_file(f"{address.removeprefix('memory:/')}/{path.name}", path.read_bytes())
        return address

    try:
        seen: list[tuple[str, int, int]] = []
        assert verify(upload(), lambda *args: seen.append(args)) == []
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen) and seen[-1][1] == seen[-1][2]
        rewrite(folder / SHARD, flip(places(folder)[4][1]))
        cut = len((folder / "train-00002.tar").read_bytes()) - 3000
        rewrite(folder / "train-00002.tar", lambda content: content[:cut])
        (folder / "train-00003.tar").unlink()
        rewrite(folder / "train-00003.idx", lambda content: content[:90])
        rewrite(folder / "train-00000.tar", lambda content: b"")
        rewrite(folder / "documents.jsonl", lambda content: content + b"{")
        if not served:  # which lists no folder
            shutil.copy(folder / SHARD, folder / "train-00099.tar")
        here = findings(folder)
        assert len(here) == (7 if not served else 6) and findings(upload()) == here
        (folder / "tokenizer.json").unlink()
        rewrite(folder / "manifest.json", lambda content: content.replace(b'"eod_id": 256', b'"eod_id": 255'))
        if not served:
            assert "changed after packing" in only(verify(upload(), deadline_s=4), "manifest.json").problem
        else:
            served.faults = ["503"]
            with pytest.raises(DataError, match="not read within"):
                verify(address, deadline_s=0.4)
        with pytest.raises(DataError, match="nowhere"):
            verify(f"{address}-nowhere" if not served else "memory://nowhere", deadline_s=0.4)
    finally:
        if served:
            served.close()


def test_bytes_that_change_on_their_way_are_no_damage(packed: Path) -> None:
    pytest.importorskip("aiohttp")
    served = Server(packed)
    try:
        wrong = iter(range(10**9))
        answer = served.answer

        def once_wrong(request: Any) -> None:
            own = request.command == "GET" and request.path.endswith("train-00001.tar")
            served.faults = ["flip"] if own and next(wrong) == 0 else ["ok"]
            answer(request)

        served.answer = once_wrong  # type: ignore[method-assign]
        assert verify(served.address, deadline_s=4) == []
        assert served.requests["train-00001.tar", "flip"] == 1
    finally:
        served.close()


def test_what_other_readers_left_is_named_and_not_judged(tmp_path: Path) -> None:
    folder = pack_small(tmp_path)
    for name in ("train-00000.tar.idx", "index.sqlite", "notes.tar"):
        (folder / name).write_bytes(b"x")
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "dataset.yaml").write_text("x")
    foreign: list[str] = []
    assert verify(folder, foreign=foreign) == []
    assert foreign == [".nv-meta", "index.sqlite", "notes.tar", "train-00000.tar.idx"]
    (folder / "train-99999.tar").write_bytes((folder / "train-00000.tar").read_bytes())
    [damage] = verify(folder)
    assert damage.file == "train-99999.tar" and "does not belong" in damage.problem
