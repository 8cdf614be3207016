"""A remote dataset on this node: manifest, tokenizer and indexes are copied, shards are read through a reader."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.crc32c import crc32c
from data.errors import DataError
from data.index import parse_header, read_header, records_at
from data.manifest import DOCUMENTS, MANIFEST, PACK_RECORD, TOKENIZER, Manifest, ShardInfo, parse_manifest
from data.node_cache import CachedReader, RangeReader, place_file
from data.storage import MissingError, Storage

DEFAULT_CACHE = "~/.cache/trimtab/data"
_PARALLEL = 8


@dataclass(frozen=True)
class Remote:
    """How to reach a remote dataset.

    Attributes:
        cache_dir: folder of this node for the small files and, with a cap, for shards; empty is ~/.cache/trimtab/data.
        cache_gb: most GB (10^9 bytes) of shards kept there; 0 keeps none, they are read by range.
        deadline_s: longest time for one file or range, all tries together.
    """

    cache_dir: str = ""
    cache_gb: float = 0.0
    deadline_s: float = 300.0

    @property
    def root(self) -> Path:
        """The cache's folder."""
        return Path(self.cache_dir or DEFAULT_CACHE).expanduser()


class Mirror:
    """A remote dataset's manifest, the folder of its small files on this node, and readers of its shards."""

    def __init__(self, address: str, remote: Remote) -> None:
        self.remote = remote
        self.storage = Storage(address, remote.deadline_s)
        where, recorded = f"{address}/{MANIFEST}", ""
        with suppress(MissingError):  # where packing left no note, the manifest stands alone
            recorded = str(_object(self.storage.read(PACK_RECORD, check=_object)).get("fingerprint", ""))
        raw = self.storage.read(MANIFEST, check=lambda content: parse_manifest(content, where, recorded))
        self.manifest: Manifest = parse_manifest(raw, where, recorded)
        self.folder = remote.root / self.manifest.fingerprint[:32]
        if _content(self.folder / MANIFEST) != raw:
            place_file(self.folder / MANIFEST, raw)

    def fetch_small_files(self) -> None:
        """Copies the tokenizer and every index that is not here yet, each checked against the manifest.

        Raises:
            DataError: a file is not the manifest's, or did not come in time.
        """
        self._fetch(TOKENIZER, self.manifest.tokenizer_sha256)
        shards = [*self.manifest.train.shards, *self.manifest.heldout.shards]
        with ThreadPoolExecutor(_PARALLEL) as executor:
            list(executor.map(self._fetch_index, shards))

    def fetch_documents(self) -> None:
        """Copies the list of documents, which only people and the evaluation need."""
        self._fetch(DOCUMENTS, self.manifest.documents_sha256)

    def reader(self, shards: tuple[ShardInfo, ...]) -> CachedReader | RangeReader:
        """Reads these shards, through the cache if there is one."""
        if not self.remote.cache_gb:
            return RangeReader(self.storage, shards)
        cap = int(self.remote.cache_gb * 1e9)
        largest = max((shard.n_bytes for shard in shards), default=0)
        if largest > cap:
            raise DataError(
                f"data.cache_gb = {self.remote.cache_gb:g} is smaller than one shard of {largest / 1e9:.3g} GB; raise "
                f"it to a window's shards or more, or use 0 to read by range"
            )
        return CachedReader(self.storage, self.folder, self.remote.root, shards, cap)

    def _fetch(self, name: str, sha256: str) -> None:
        path = self.folder / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            place_file(path, self.storage.read(name, sha256=sha256))

    def _fetch_index(self, shard: ShardInfo) -> None:
        path = self.folder / shard.index
        if path.exists():
            try:
                if read_header(path).records_crc == shard.index_crc32c:
                    return
            except DataError:
                pass  # cut or damaged on this node: fetched again

        def check(raw: bytes) -> None:
            header = parse_header(raw, len(raw), shard.index)
            if not header.records_crc == shard.index_crc32c == crc32c(records_at(raw)):
                raise DataError("it is the index of another packing")

        place_file(path, self.storage.read(shard.index, check=check))


def _object(raw: bytes) -> dict:
    """A JSON object."""
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise DataError(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError("it is not a JSON object")
    return found


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
