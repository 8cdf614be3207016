"""Remote shards through a server that fails: the same batches in the same order, or a clear failure in time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.dataset import describe, open_dataset
from data.errors import DamagedSampleError, DataError
from data.manifest import read_manifest
from data.mirror import Remote
from data.plan import Plan
from data.storage import MissingError, Storage, StorageError, address_problems, check_name, is_remote
from data.stream import MicroBatch, Stream
from tests.unit.data_samples import pack_small
from tests.unit.flaky_server import Server

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small(tmp_path_factory.mktemp("remote"))


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    served = Server(folder)
    yield served
    served.close()


def batches(path: str | Path, remote: Remote | None, n_steps: int = 12) -> list[list[MicroBatch]]:
    with open_dataset(path, remote) as dataset:
        plan = Plan.of(dataset, DataConfig(seq_len=32, lanes=12, window_shards=2))
        with Stream(dataset, plan, 0, 1, 12, 4, cache_mb=1) as stream:
            return [stream.read(step) for step in range(n_steps)]


def same(first: list[list[MicroBatch]], second: list[list[MicroBatch]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a, b)
        for one, other in pairs
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_flaky_server_gives_the_same_batches(
    folder: Path, server: Server, tmp_path: Path, cache_gb: float, seed: int
) -> None:
    server.draw.seed(seed)
    server.faults = ["ok"] * 12 + ["503", "503", "cut", "flip"] + (["hang"] if cache_gb else [])
    remote = Remote(str(tmp_path / "cache"), cache_gb, deadline_s=4)
    assert same(batches(server.address, remote), batches(folder, None))
    seen = Counter(fault for (_, fault), n in server.requests.items() for _ in range(n))
    assert seen["503"] and seen["cut"] + seen["flip"], seen
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert bool(cached) == bool(cache_gb)
    assert not list((tmp_path / "cache").rglob("*.tmp")) and not list((tmp_path / "cache").rglob("*.claim"))


@pytest.mark.parametrize("fault", ["503", "hang", "cut"])
def test_a_server_that_never_recovers_fails_within_the_deadline(server: Server, tmp_path: Path, fault: str) -> None:
    for cache_gb in (0.0, 1.0):
        server.faults = ["ok"]
        remote = Remote(str(tmp_path / str(cache_gb)), cache_gb, deadline_s=0.6)
        with open_dataset(server.address, remote) as dataset:
            server.faults = [fault]
            plan = Plan.of(dataset, DataConfig(seq_len=32, lanes=12))
            started = time.monotonic()
            with Stream(dataset, plan, 0, 1, 12, 12) as stream, pytest.raises(StorageError) as caught:
                stream.read(0)
            assert time.monotonic() - started < 5
            assert "data.deadline_s = 0.6 s" in str(caught.value) and server.address in str(caught.value)


def test_one_fetch_serves_many_readers_and_a_second_start_fetches_nothing(server: Server, tmp_path: Path) -> None:
    remote = Remote(str(tmp_path / "cache"), 1.0, 10)
    found: list[list[list[MicroBatch]]] = []
    threads = [threading.Thread(target=lambda: found.append(batches(server.address, remote))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and same(found[0], found[1]) and same(found[0], found[2])
    shards = {name: n for (name, _), n in server.requests.items() if name.endswith(".tar")}
    assert shards and set(shards.values()) == {1}, "each shard came once, whoever asked first"
    server.requests.clear()
    batches(server.address, remote)
    assert {name for name, _ in server.requests} == {"manifest.json", "pack.json"}


def test_a_dead_fetchers_claim_is_taken_over(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.node_cache._STALE_S", 0.2)
    remote = Remote(str(tmp_path / "cache"), 1.0, 10)
    with open_dataset(server.address, remote) as dataset:
        folder = next((tmp_path / "cache").iterdir())
        for info in dataset.manifest.train.shards:
            (folder / f"{info.file}.claim").touch()
        assert len(dataset.train.read(0, 0)) == int(dataset.train.records(0)[0]["n_tokens"])


def test_the_cap_holds_by_removing_or_by_reading_ranges(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard.n_bytes for shard in read_manifest(folder).train.shards]
    cap_gb = (max(sizes) * 2.5) / 1e9
    for kept_s in (60.0, 0.0):  # in use until a minute ago: ranges; else: the least recently used goes
        monkeypatch.setattr("data.node_cache._KEPT_S", kept_s)
        root = tmp_path / str(kept_s)
        assert same(batches(server.address, Remote(str(root), cap_gb, 10)), batches(folder, None))
        assert sum(path.stat().st_size for path in root.rglob("*.tar")) <= cap_gb * 1e9
    with pytest.raises(DataError, match=r"data\.cache_gb = .* smaller than one shard"):
        open_dataset(server.address, Remote(str(tmp_path / "c"), 1e-9, 10))


def test_damage_in_the_storage_itself_is_named(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with open_dataset(copy) as dataset:
        offset = int(dataset.train.records(0)[0]["offset"])
        name = dataset.manifest.train.shards[0].file
    content = bytearray((copy / name).read_bytes())
    content[offset] ^= 1
    (copy / name).write_bytes(content)
    served = Server(copy)
    try:
        with (
            open_dataset(served.address, Remote(str(tmp_path / "a"), 0.0, 2)) as dataset,
            pytest.raises(DamagedSampleError, match=f"{served.address}/{name}: sample"),
        ):
            dataset.train.read(0, 0)
        with (
            open_dataset(served.address, Remote(str(tmp_path / "b"), 1.0, 20)) as dataset,
            pytest.raises(StorageError, match="not the manifest's"),
        ):
            dataset.train.read(0, 0)
    finally:
        served.close()


def test_memory_and_file_addresses(folder: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    remote = Remote(str(tmp_path), 0.0, 5)
    assert describe("memory://corpus", remote).fingerprint == describe(folder).fingerprint
    with open_dataset("memory://corpus", remote) as dataset, open_dataset(f"file://{folder}") as local:
        assert [d.name for d in dataset.heldout_documents()] == [d.name for d in local.heldout_documents()]
        assert dataset.tokenizer.spec == "bytes"
    with pytest.raises(MissingError, match="nowhere"):
        describe("memory://nowhere", remote)


def test_addresses_and_names_are_restricted() -> None:
    for bad in ("pipe:cat x", "simplecache::s3://a", "pipe://x", "shell://x", "S3 ://x", "reference://x"):
        assert address_problems(bad), bad
        with pytest.raises(DataError):
            Storage(bad, 1)
    for good in ("s3://b/c", "gs://b", "https://h/p", "memory://a", "datasets/python", "/abs/path", "C:odd"):
        assert not address_problems(good), good
    for name in ("../x.tar", "/etc/passwd", ".hidden", "a/b.tar", "pipe:cat", "", "x\n"):
        with pytest.raises(DataError, match="only plain names"):
            check_name(name, "manifest")
    assert is_remote("s3://x") and not is_remote("file:///x") and not is_remote("datasets/python")
    assert DataConfig(path="pipe:cat").problems() and DataConfig(cache_gb=-1.0, deadline_s=0.0).problems()
