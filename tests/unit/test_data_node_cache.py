"""One cache folder for several jobs: real processes that share, are killed, and keep to the cap."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import node_cache
from data.dataset import open_dataset
from data.manifest import read_manifest
from data.mirror import Remote
from tests.unit.data_samples import pack_small
from tests.unit.flaky_server import Server

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import hashlib, sys
from data import node_cache
from data.dataset import open_dataset
from data.mirror import Remote

address, cache, cap_gb, node_cache._KEPT_S, node_cache._STALE_S = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
digest = hashlib.sha256()
with open_dataset(address, Remote(cache, cap_gb, deadline_s=8)) as dataset:
    print("open", flush=True)
    shards = range(len(dataset.manifest.train.shards))
    for shard in shards:
        dataset.train.prefetch(range(shard, min(shard + 3, len(shards))))
        for row in range(dataset.manifest.train.shards[shard].n_documents):
            digest.update(dataset.train.read(shard, row).tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    served = Server(folder)
    yield served
    served.close()


def job(server: Server, cache: Path, cap_gb: float, kept_s: float = 60.0, stale_s: float = 20.0) -> subprocess.Popen:
    words = [server.address, str(cache), *map(str, (cap_gb, kept_s, stale_s))]
    return subprocess.Popen(
        [sys.executable, "-c", JOB, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def expected(folder: Path) -> str:
    digest = hashlib.sha256()
    with open_dataset(folder) as dataset:
        for shard, info in enumerate(dataset.manifest.train.shards):
            for row in range(info.n_documents):
                digest.update(dataset.train.read(shard, row).tobytes())
    return digest.hexdigest()


def watching(look: Callable[[], None]) -> Callable[[], None]:
    """Calls `look` again and again in the background until the returned function is called, which waits for its end."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            look()
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    return stop


def occupied(cache: Path) -> int:
    """Bytes of the shards, whole and half-written; 0 where files came or went while they were counted."""

    def count() -> dict[Path, int]:
        found = {}
        for path in [*cache.glob("*/*.tar"), *cache.glob("*/*.tmp")]:
            try:
                found[path] = path.stat().st_size if ".tar" in path.name else 0
            except OSError:
                continue  # removed or renamed in between
        return found

    first = count()
    return sum(first.values()) if first == count() else 0


def downloads(server: Server) -> Counter[str]:
    return Counter({name: n for (name, _), n in server.requests.items() if name.startswith("train-")})


@pytest.mark.parametrize("capped", [False, True])
def test_two_processes_share_a_cache(folder: Path, server: Server, tmp_path: Path, capped: bool) -> None:
    infos = {info.file: info for info in read_manifest(folder).train.shards}
    largest = max(info.n_bytes for info in infos.values())
    cap = int(3.2 * largest) if capped else 10**9
    server.faults, server.held = ["slow"], {next(iter(infos))}
    wrong: list[str] = []
    most = [0]

    def look() -> None:
        for path in tmp_path.glob("cache/*/*.tar"):
            try:
                content = path.read_bytes()
            except OSError:
                continue  # removed in between
            if hashlib.sha256(content).hexdigest() != infos[path.name].sha256:
                wrong.append(path.name)
        most[0] = max(most[0], occupied(tmp_path / "cache"))

    stop = watching(look)
    jobs = [job(server, tmp_path / "cache", cap / 1e9, kept_s=0.0 if capped else 60.0) for _ in range(2)]
    assert [one.stdout.readline() for one in jobs if one.stdout] == ["open\n"] * 2
    time.sleep(0.3)  # now both want the first shard, and one has its claim
    server.release.set()
    said = [one.communicate(timeout=60)[0] for one in jobs]
    stop()
    assert [one.returncode for one in jobs] == [0, 0], said
    assert [text.strip() for text in said] == [expected(folder)] * 2
    assert not wrong, "a shard was visible before it was whole"
    assert not list(tmp_path.glob("cache/*/*.claim")) and not list(tmp_path.glob("cache/*/*.tmp"))
    shards = {name: n for name, n in downloads(server).items() if name.endswith(".tar")}
    if capped:
        assert 0 < most[0] <= cap
    else:
        assert shards == dict.fromkeys(infos, 1), "each shard came once, whoever asked first"


def test_a_killed_process_blocks_the_other_no_longer_than_its_claim_holds(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    shard = read_manifest(folder).train.shards[1]
    held = shard.file
    server.held = {held}
    first = job(server, tmp_path / "cache", 1.0)
    deadline = time.monotonic() + 30

    def reserves(claim: Path) -> bool:
        return claim.stem == held and claim.stat().st_size == shard.n_bytes

    while not (claims := [path for path in tmp_path.glob("cache/*/*.claim") if reserves(path)]):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "no claim reserves the shard's bytes"
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = claims[0].with_name(f"{held}.1-dead.tmp")
    left.write_bytes(b"what it had written")
    server.release.set()
    second = job(server, tmp_path / "cache", 1.0, stale_s=0.5)  # with a deadline of 8 s and the claim for 20 it fails
    said = second.communicate(timeout=60)[0]
    assert (second.returncode, said.split()) == (0, ["open", expected(folder)]), said
    assert not left.exists() and not claims[0].exists() and (claims[0].parent / held).is_file()


@pytest.mark.parametrize("kept_s", [60.0, 0.0])
def test_the_cap_holds_while_several_shards_are_fetched(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_s: float
) -> None:
    monkeypatch.setattr("data.node_cache._KEPT_S", kept_s)
    infos = read_manifest(folder).train.shards
    cap = int(2.5 * max(info.n_bytes for info in infos))
    most = [0]

    def look() -> None:
        most[0] = max(most[0], occupied(tmp_path / "cache"))

    with open_dataset(server.address, Remote(str(tmp_path / "cache"), cap / 1e9, 10)) as dataset:
        server.faults = ["slow"]
        stop = watching(look)
        for _ in range(3):
            dataset.train.prefetch(range(len(infos)))
            for shard, info in enumerate(infos):
                assert len(dataset.train.read(shard, info.n_documents - 1))
        stop()
    assert 0 < most[0] <= cap


def test_a_dead_claim_does_not_keep_its_room(folder: Path, server: Server, tmp_path: Path) -> None:
    infos = read_manifest(folder).train.shards
    cap = int(1.5 * max(info.n_bytes for info in infos))
    with open_dataset(server.address, Remote(str(tmp_path / "cache"), cap / 1e9, 10)) as dataset:
        (cache,) = (tmp_path / "cache").iterdir()
        claim = cache / f"{infos[2].file}.claim"
        claim.write_bytes(bytes(cap))
        dataset.train.read(0, 0)
        assert not (cache / infos[0].file).exists(), "no room beside a shard that another process fetches"
        os.utime(claim, (time.time() - 60, time.time() - 60))
        dataset.train.read(0, 0)
        assert (cache / infos[0].file).exists() and not claim.exists()


@pytest.mark.parametrize("jump_s", [-3600.0, 0.0, 3600.0])
def test_a_dead_claim_ends_and_a_living_one_is_honoured_when_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """The clock of this machine jumps; the times of files are as they were set before."""
    now = [1000.0]
    monkeypatch.setattr("data.node_cache.time.monotonic", lambda: now[0])
    began = time.time()
    monkeypatch.setattr("data.node_cache.time.time", lambda: began + jump_s + now[0] - 1000.0)
    claim, watch = tmp_path / "s.tar.claim", node_cache._ClaimWatch()
    (tmp_path / "s.tar.1-a.tmp").write_text("half")
    assert node_cache._claim(claim, 100)
    os.utime(claim, (began, began))
    if jump_s > 0:  # it looks old: the other one fetches the shard too, which costs no more than a transfer
        assert watch.cleared(claim)
        return
    for _ in range(5):  # renewed as `_renew` does, by the file system's clock
        assert not watch.cleared(claim)
        now[0] += node_cache._STALE_S / 4
        os.utime(claim, (began + now[0] - 1000.0,) * 2)
    assert not watch.cleared(claim)
    now[0] += 1.1 * node_cache._STALE_S
    assert watch.cleared(claim) and list(tmp_path.iterdir()) == []


def test_room_is_made_although_all_uses_lie_ahead(tmp_path: Path) -> None:
    """After the clock was set back by an hour, what was used before that is not held for used just now."""
    (tmp_path / "d").mkdir()
    for number in range(4):
        shard = tmp_path / "d" / f"{number}.tar"
        shard.write_bytes(b"x" * 100)
        os.utime(shard, (time.time() + 3600 + number,) * 2)
    (tmp_path / "d" / "4.tar").write_bytes(b"x" * 100)  # used just now, by the new clock
    reader = node_cache.CachedReader(None, tmp_path / "d", tmp_path, [], 250)
    assert reader._make_room()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["3.tar", "4.tar"]
    reader.close()
