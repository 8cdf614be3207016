"""Remote shards cached on a node: checked on arrival, published by renaming, shared by processes, bounded in size."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from data.errors import DataError
from data.manifest import ShardInfo
from data.shards import ShardReader
from data.storage import Storage, StorageError

_FETCHERS = 4
_STALE_S = 20.0  # a claim that was not renewed for so long belongs to a process that died
_KEPT_S = 60.0  # a shard used so recently is not removed to make room
_WATCHED_LIMIT = 4096


def place_file(path: Path, content: bytes) -> None:
    """Writes a file under a name of its own and renames it; of several writers of the same content any may win."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RangeReader:
    """Reads ranges of remote shards without keeping them. As ShardReader."""

    remote = True

    def __init__(self, storage: Storage, shards: Sequence[ShardInfo]) -> None:
        self._storage, self._shards = storage, tuple(shards)

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """Bytes [offset, offset + nbytes) of a shard; fewer only where the manifest says that it ends before."""
        info = self._shards[shard]
        return self._storage.read_range(info.file, offset, max(0, min(nbytes, info.n_bytes - offset)))

    def prefetch(self, shards: Iterable[int]) -> None:
        """Nothing: ranges are read ahead with the steps."""

    def close(self) -> None:
        """Nothing is open."""


class CachedReader:
    """Reads shards from a folder of the node and fetches those that are not there, whole and checked.

    Processes of one node share the folder: one fetches a shard (it holds a claim, a file NAME.claim of the shard's
    size that takes no space), the others wait for it; if it dies, the next one takes over. A claim counts against
    `cap_bytes` like the shard that it stands for. Whoever has claimed looks afterwards whether all that is there and
    claimed fits: of two that claim at once, the later one sees both. Shards that were used least recently go when the
    cap is exceeded. Where all were used in the last minute, a shard is read by range instead: the cap is then too small
    for the windows that are being read.

    Args:
        storage: where the shards come from.
        folder: this dataset's part of the cache.
        root: the whole cache, to which the cap applies.
        shards: of the split.
        cap_bytes: most bytes of all shards in the cache, those that are being fetched included.
    """

    remote = True

    def __init__(self, storage: Storage, folder: Path, root: Path, shards: Sequence[ShardInfo], cap_bytes: int) -> None:
        self._storage, self._folder, self._root, self._shards = storage, folder, root, tuple(shards)
        self._cap = cap_bytes
        self._files = ShardReader(folder, [shard.file for shard in shards])
        self._ranges = RangeReader(storage, shards)
        self._fetching: dict[int, Future[bool]] = {}
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="trimtab-fetch")
        self._touched: dict[int, float] = {}
        self._watch = _ClaimWatch()

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """Bytes [offset, offset + nbytes) of a shard.

        Raises:
            StorageError: it could not be fetched within the deadline.
        """
        while not self._at_hand(shard):
            if not self._fetched(shard).result():
                return self._ranges.read(shard, offset, nbytes)
        try:
            return self._files.read(shard, offset, nbytes)
        except DataError:
            if self._at_hand(shard):
                raise
            return self.read(shard, offset, nbytes)  # another process made room in between

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begins to fetch shards in the background."""
        for shard in shards:
            if not self._at_hand(shard):
                self._fetched(shard)

    def close(self) -> None:
        """Stops fetching and closes files."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._files.close()

    def _at_hand(self, shard: int) -> bool:
        """Whether a shard's file is there; notes its use now and then."""
        now = time.monotonic()
        if now - self._touched.get(shard, -_KEPT_S) < _KEPT_S / 4:
            return True
        try:
            os.utime(self._folder / self._shards[shard].file)
        except OSError:
            self._touched.pop(shard, None)
            return False
        self._touched[shard] = now
        return True

    def _fetched(self, shard: int) -> Future[bool]:
        with self._lock:
            future = self._fetching.get(shard)
            if future is None or future.done():
                future = self._fetching[shard] = self._executor.submit(self._fetch, shard)
            return future

    def _fetch(self, shard: int) -> bool:
        """Brings a shard into the cache, itself or by waiting for another process; False where there is no room."""
        info = self._shards[shard]
        path = self._folder / info.file
        claim = path.with_name(f"{info.file}.claim")
        deadline = time.monotonic() + self._storage.deadline_s
        while not path.exists():
            token = _claim(claim, info.n_bytes)
            if not token:
                self._wait_for(path, claim, deadline)
                continue
            alive = threading.Event()
            threading.Thread(target=_renew, args=(claim, token, alive), daemon=True).start()
            try:
                if path.exists():  # whoever had the claim before has brought it
                    return True
                if not self._make_room():
                    return False
                place_file(path, self._storage.read(info.file, info.n_bytes, info.sha256))
            except FileNotFoundError:  # stopped for so long that another process took over and cleared up
                if time.monotonic() > deadline:
                    raise
            finally:
                alive.set()
                if _token(claim) == token:
                    claim.unlink(missing_ok=True)
        return True

    def _wait_for(self, path: Path, claim: Path, deadline: float) -> None:
        """Waits while another process fetches a file; removes its claim if it has died."""
        while not path.exists():
            if not claim.exists() or self._watch.cleared(claim):
                return  # it gave up, or has died
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path}: another process did not fetch it within data.deadline_s = {self._storage.deadline_s:g} "
                    f"s; check the storage, or remove {claim} if no such process runs"
                )
            time.sleep(0.02)

    def _make_room(self) -> bool:
        """Removes shards until all that are there or claimed fit under the cap; False where those left were all used
        just now."""
        claimed: dict[Path, int] = {}
        for claim in self._root.glob("*/*.claim"):  # before the shards: one that arrives in between shows in both
            if (status := _status(claim)) is not None and not self._watch.cleared(claim):
                claimed[claim.with_suffix("")] = status.st_size
        shards = []
        for path in self._root.glob("*/*.tar"):
            if (status := _status(path)) is not None and path not in claimed:
                shards.append((status.st_mtime, status.st_size, path))
        total = sum(claimed.values()) + sum(size for _, size, _ in shards)
        for used, size, path in sorted(shards, key=lambda entry: entry[:2]):
            if total <= self._cap:
                break
            if abs(time.time() - used) < _KEPT_S:  # a use that lies ahead is from before the clock was set back
                continue
            path.unlink(missing_ok=True)
            total -= size
        return total <= self._cap


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None  # another process removed it


def _claim(claim: Path, n_bytes: int) -> str:
    """Makes a claim of a shard's size; returns what proves it to be ours, empty where there is a claim already."""
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return ""
    token = uuid.uuid4().hex
    try:
        os.write(handle, token.encode("ascii"))
        os.ftruncate(handle, max(n_bytes, len(token)))
    finally:
        os.close(handle)
    return token


def _token(claim: Path) -> str:
    """Whose claim it is; empty where there is none."""
    try:
        with claim.open("rb") as file:
            return file.read(32).decode("ascii", errors="replace")
    except OSError:
        return ""


class _ClaimWatch:
    """Tells claims that nobody renews any more, whatever the wall clock does. Thread-safe.

    A claim's time of renewal is the file system's. It is old when it lies well behind this machine's clock, or when it
    has not moved while this process watched: where the clock was set back, a dead claim lies ahead of it for long. A
    clock that was set forward makes a living claim look old once: then two processes fetch one shard, both the same.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, int, float]] = {}  # token, time of renewal, since when (monotonic)
        self._lock = threading.Lock()

    def cleared(self, claim: Path) -> bool:
        """Removes a claim that nobody renews, and what its process has left of the shard; False where it is alive."""
        token, status = _token(claim), _status(claim)
        if status is None:
            return False
        if time.time() - status.st_mtime <= _STALE_S and not self._stands_still(claim, token, status.st_mtime_ns):
            return False
        if _token(claim) == token:  # not a new one that another process has made in between
            for left in claim.parent.glob(f"{claim.stem}.*.tmp"):
                left.unlink(missing_ok=True)
            claim.unlink(missing_ok=True)
        return True

    def _stands_still(self, claim: Path, token: str, renewed_at: int) -> bool:
        now = time.monotonic()
        with self._lock:
            seen = self._seen.get(claim)
            if seen is None or seen[:2] != (token, renewed_at):
                if len(self._seen) >= _WATCHED_LIMIT:
                    self._seen.clear()
                self._seen[claim] = (token, renewed_at, now)
                return False
            return now - seen[2] > _STALE_S


def _renew(claim: Path, token: str, done: threading.Event) -> None:
    """Keeps a claim fresh while its process lives."""
    while not done.wait(_STALE_S / 4):
        if _token(claim) != token:
            return
        with suppress(OSError):
            os.utime(claim)
