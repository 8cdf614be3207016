"""An opened dataset: lengths for the plan, checked reading of documents, the tokenizer, the held-out documents."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.crc32c import crc32c
from data.errors import DamagedSampleError, DataError
from data.index import RECORD, RECORD_LAYOUT, IndexHeader, map_records, read_header
from data.manifest import DOCUMENTS, TOKENIZER, Manifest, ShardInfo, SplitInfo, read_documents, read_manifest
from data.mirror import Mirror, Remote
from data.node_cache import CachedReader, RangeReader
from data.shards import BLOCK, TEXT_SUFFIX, TOKENS_SUFFIX, ShardReader
from data.storage import is_remote, local_path
from data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Description:
    """What a configuration check needs to know of a dataset.

    Attributes: vocab_size, eod_id, tokenizer (its specification) and tokenizer_sha256 (of its file, hex); n_tokens,
    n_documents of the training split
    (tokens include one end token a document); n_heldout documents; fingerprint (sha256 of the manifest, hex).
    """

    path: Path | str
    vocab_size: int
    eod_id: int
    tokenizer: str
    n_tokens: int
    n_documents: int
    n_heldout: int
    fingerprint: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class HeldoutDocument:
    """A held-out document: its name, its raw bytes, its tokens (n,) int64 with the end token last."""

    name: str
    data: bytes
    tokens: np.ndarray


def describe(path: str | Path, remote: Remote | None = None) -> Description:
    """Reads only the manifest: milliseconds, or as long as a remote storage takes.

    Raises:
        DataError: the folder is missing, empty, not a dataset, or its manifest is damaged.
    """
    if is_remote(path):
        manifest = Mirror(str(path), remote or Remote()).manifest
    else:
        manifest = read_manifest(local_path(path))
    return Description(
        path=path if is_remote(path) else local_path(path),
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        tokenizer=manifest.tokenizer,
        n_tokens=manifest.train.n_tokens,
        n_documents=manifest.train.n_documents,
        n_heldout=manifest.heldout.n_documents,
        fingerprint=manifest.fingerprint,
        tokenizer_sha256=manifest.tokenizer_sha256,
    )


def open_dataset(path: str | Path, remote: Remote | None = None) -> Dataset:
    """Opens a dataset after checking the manifest, every file's presence and size, and every index's header.

    Args:
        path: a folder, or an address of remote storage such as s3://bucket/corpus; its shards' sizes show when read.
        remote: how to reach it, where it is an address.

    Raises:
        DataError: anything of this is wrong; the message names the file and what to do.
    """
    if is_remote(path):
        mirror = Mirror(str(path), remote or Remote())
        mirror.fetch_small_files()
        return Dataset(str(path), mirror.manifest, mirror)
    return Dataset(local_path(path), read_manifest(local_path(path)))


class Split:
    """One split's shards: lengths of their documents, and documents read back with their checksum verified.

    The indexes are memory-mapped, and their records checked, shard by shard when they are needed. Thread-safe.
    """

    def __init__(self, folder: Path, info: SplitInfo, manifest: Manifest, mirror: Mirror | None = None) -> None:
        self.folder, self.info = folder, info
        self._origin = mirror.storage.address if mirror else str(folder)
        self.dtype = np.dtype(manifest.dtype)
        self.vocab_size, self.eod_id = manifest.vocab_size, manifest.eod_id
        self.shard_tokens = np.array([shard.n_tokens for shard in info.shards], dtype=np.int64)
        self.shard_documents = np.array([shard.n_documents for shard in info.shards], dtype=np.int64)
        self._headers = [_check_shard(folder, shard, here=mirror is None) for shard in info.shards]
        self._records: dict[int, np.ndarray] = {}
        self._reader: ShardReader | CachedReader | RangeReader = (
            mirror.reader(info.shards) if mirror else ShardReader(folder, [shard.file for shard in info.shards])
        )
        self._lock = threading.Lock()

    def records(self, shard: int) -> np.ndarray:
        """The index records of a shard, (n,) of dtype RECORD, memory-mapped."""
        known = self._records.get(shard)
        if known is not None:
            return known
        with self._lock:
            if shard not in self._records:
                info = self.info.shards[shard]
                records = map_records(self.folder / info.index, self._headers[shard])
                if int(records["n_tokens"].sum()) != info.n_tokens:
                    raise DataError(f"{self.folder / info.index}: does not sum to {info.n_tokens} tokens; {_STALE}")
                while len(self._records) >= _MAPPED_INDEXES:
                    self._records.pop(next(iter(self._records)))
                self._records[shard] = records
            return self._records[shard]

    def document_tokens(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, (n,) int64, each with its end token."""
        return self.records(shard)["n_tokens"].astype(np.int64)

    def read(self, shard: int, row: int) -> np.ndarray:
        """All tokens of a document, (n,) of the stored dtype, read-only, its checksum verified.

        Raises:
            DamagedSampleError: the bytes are not those that were packed, or a token is outside the vocabulary.
        """
        tokens = np.frombuffer(self.read_bytes(shard, row), self.dtype)
        self.check_vocabulary(shard, row, tokens)
        return tokens

    def read_bytes(self, shard: int, row: int) -> bytes:
        """The bytes of a document's tokens, their checksum verified; not compared with the vocabulary.

        Raises:
            DamagedSampleError: the bytes are not those that were packed.
        """
        _, offset, nbytes, _, checksum = RECORD_LAYOUT.unpack_from(self.records(shard).data, row * RECORD.itemsize)
        raw = self._reader.read(shard, offset, nbytes)
        if self._reader.remote:
            for _ in range(_ARRIVALS):  # damaged on its way or in the storage: only a repeat can tell
                if len(raw) == nbytes and crc32c(raw) == checksum:
                    break
                raw = self._reader.read(shard, offset, nbytes)
        if len(raw) != nbytes or crc32c(raw) != checksum:
            short = len(raw) != nbytes
            problem = f"the shard ends inside it ({len(raw)} of {nbytes} bytes)" if short else "its checksum is wrong"
            self._damaged(shard, self.records(shard)[row], problem)
        return raw

    def read_range(self, shard: int, row: int, start: int, stop: int) -> bytes:
        """The bytes of tokens [start, stop) of a document without any check, for documents that were verified before.

        Raises:
            DamagedSampleError: the shard has become shorter.
        """
        record = self.records(shard)[row]
        itemsize = self.dtype.itemsize
        raw = self._reader.read(shard, int(record["offset"]) + start * itemsize, (stop - start) * itemsize)
        if len(raw) != (stop - start) * itemsize:
            self._damaged(shard, record, "the shard ends inside it")
        return raw

    def read_text(self, shard: int, row: int) -> bytes:
        """The raw text that a held-out sample stores behind its tokens.

        Raises:
            DamagedSampleError: it is not there.
        """
        record = self.records(shard)[row]
        header_at = int(record["offset"]) + int(record["nbytes"]) + -int(record["nbytes"]) % BLOCK
        header = self._reader.read(shard, header_at, BLOCK)
        if len(header) < BLOCK or not header[:100].rstrip(b"\0").endswith(TEXT_SUFFIX.encode()):
            self._damaged(shard, record, "its raw text is missing")
        size = int(header[124:136].rstrip(b"\0 "), 8)
        raw = self._reader.read(shard, header_at + BLOCK, size)
        if len(raw) != size:
            self._damaged(shard, record, "the shard ends inside its raw text")
        return raw

    def check_vocabulary(self, shard: int, row: int, tokens: np.ndarray) -> None:
        """Checks tokens (n,) of a document.

        Raises:
            DamagedSampleError: one is outside the vocabulary.
        """
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            problem = f"token {int(tokens.max())} is outside the vocabulary of {self.vocab_size}"
            self._damaged(shard, self.records(shard)[row], problem)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Says which shards will be needed soon; those in a remote storage are fetched in the background."""
        self._reader.prefetch(shards)

    def key(self, shard: int, row: int) -> str:
        """A sample's key as the shard's tar header has it; its hash in hex where the header is unreadable."""
        return self._key(shard, self.records(shard)[row])

    def close(self) -> None:
        """Closes the shards' files."""
        self._reader.close()

    def _key(self, shard: int, record: np.void) -> str:
        fallback = f"#{int(record['key_hash']):016x}"
        if int(record["offset"]) < BLOCK:
            return fallback
        header = self._reader.read(shard, int(record["offset"]) - BLOCK, BLOCK)
        name = header[:100].rstrip(b"\0").decode("ascii", errors="replace")
        return name.removesuffix(TOKENS_SUFFIX) if name.endswith(TOKENS_SUFFIX) else fallback

    def _damaged(self, shard: int, record: np.void, problem: str) -> None:
        path = f"{self._origin}/{self.info.shards[shard].file}"
        raise DamagedSampleError(path, self._key(shard, record), int(record["offset"]), problem)


class Dataset:
    """An opened dataset. Use `open_dataset`; close it or use it as a context manager.

    Attributes: path (an address where the data is remote), manifest, fingerprint (hex), train and heldout (Splits).
    """

    def __init__(self, path: Path | str, manifest: Manifest, mirror: Mirror | None = None) -> None:
        self.path, self.manifest, self._mirror = path, manifest, mirror
        self._folder = mirror.folder if mirror else Path(path)
        self.fingerprint = manifest.fingerprint
        if manifest.train.n_tokens == 0:
            raise DataError(f"data.path = {path}: holds no training documents; pack it again from more text")
        for name in (TOKENIZER, DOCUMENTS) if mirror is None else (TOKENIZER,):
            if not (self._folder / name).is_file():
                raise DataError(f"{self._folder / name}: is missing; {_STALE}")
        self.train = Split(self._folder, manifest.train, manifest, mirror)
        self.heldout = Split(self._folder, manifest.heldout, manifest, mirror)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the dataset was packed with.

        Raises:
            DataError: tokenizer.json is not the one of the manifest, or its package is not installed.
        """
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self._folder / TOKENIZER, self.manifest.tokenizer, eod_id=self.manifest.eod_id)
            if tokenizer.fingerprint != self.manifest.tokenizer_sha256:
                raise DataError(f"{self._folder / TOKENIZER}: is not the tokenizer of the packing; {_STALE}")
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def lossless(self) -> bool:
        """Whether the held-out documents' tokens stand for all of their bytes, see `Manifest.lossless`."""
        return self.manifest.lossless

    def heldout_documents(self) -> Iterator[HeldoutDocument]:
        """Yields the held-out documents in their stored order."""
        names = self._heldout_names()
        for shard, info in enumerate(self.manifest.heldout.shards):
            for row in range(info.n_documents):
                key = self.heldout.key(shard, row)
                tokens = self.heldout.read(shard, row).astype(np.int64)
                yield HeldoutDocument(names.get(key, key), self.heldout.read_text(shard, row), tokens)

    def close(self) -> None:
        """Closes the shards' files."""
        self.train.close()
        self.heldout.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _heldout_names(self) -> dict[str, str]:
        if self._mirror:
            self._mirror.fetch_documents()
        return {row["key"]: row["name"] for row in read_documents(self._folder) if row["split"] == "heldout"}


def _check_shard(folder: Path, shard: ShardInfo, *, here: bool) -> IndexHeader:
    """Checks presence and sizes of a shard (if it should be here) and its index against the manifest."""
    path = folder / shard.file
    try:
        size = path.stat().st_size if here else shard.n_bytes
    except OSError as error:
        raise DataError(f"{path}: the shard is missing ({error.strerror}); restore it or pack again") from error
    if size != shard.n_bytes:
        raise DataError(
            f"{path}: has {size} bytes instead of {shard.n_bytes}; run `trimtab data verify {folder}` to see what is "
            f"lost, then restore the shard or pack the dataset again"
        )
    header = read_header(folder / shard.index)
    if (header.n_records, header.shard_bytes, header.shard_sha256, header.records_crc) != (
        shard.n_documents,
        shard.n_bytes,
        shard.sha256,
        shard.index_crc32c,
    ):
        raise DataError(f"{folder / shard.index}: is the index of another shard or packing; {_STALE}")
    return header


_MAPPED_INDEXES = 400  # a mapping holds a file descriptor, of which a process often has 1,024 in all
_ARRIVALS = 2  # more readings of a remote sample whose checksum is wrong
_STALE = "the folder mixes files of different packings, restore it from a copy or pack the dataset again"
