"""The manifest of a dataset: what it was made of and what it holds. Its sha256 is the dataset's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.storage import check_name

MANIFEST = "manifest.json"
MIXTURE = "mixture.json"
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.jsonl"
PACK_RECORD = "pack.json"
_FORMAT = "trimtab-dataset"
_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its tar file, size, sha256, index file, the CRC-32C of the index's records, and counts."""

    file: str
    n_bytes: int
    sha256: str
    index: str
    index_crc32c: int
    n_documents: int
    n_tokens: int


@dataclass(frozen=True)
class SplitInfo:
    """One split ("train" or "heldout"): counts (tokens include one end token a document; bytes are raw text)."""

    n_documents: int
    n_tokens: int
    n_bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class SourceInfo:
    """One source: name, licence, what was taken and what was left out, by reason."""

    name: str
    licence: str
    n_documents: int
    n_bytes: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class Loss:
    """What the tokenizer loses: the share of the text's bytes that decoding does not give back, and the share of the
    tokens that are the unknown token, both of the documents that were measured."""

    lost_bytes: float
    unknown_tokens: float

    def __str__(self) -> str:
        unknown = f"{self.unknown_tokens:.2%} of the tokens are unknown"
        return f"the tokenizer loses {self.lost_bytes:.2%} of the bytes; {unknown}"


@dataclass(frozen=True)
class Manifest:
    """A dataset's contents.

    Attributes:
        tokenizer: specification it was packed with, for example "bpe:4096".
        tokenizer_sha256: of the file tokenizer.json.
        vocab_size, eod_id: of the tokenizer.
        lossless: decoding gave back the bytes of every document that was measured: of all of them with a given
            tokenizer.json, of the held-out ones and the first with the others. Bits per byte mean nothing without it.
        dtype: "<u2" or "<u4", the stored tokens.
        train, heldout: the two splits.
        sources: what it was packed from.
        n_duplicates: documents left out because an identical one was there.
        documents_sha256: of the file documents.jsonl.
        loss: how much is lost; None where nothing is, or where an older version packed.
        fingerprint: sha256 of the manifest file, not part of it.
    """

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    lossless: bool
    dtype: str
    train: SplitInfo
    heldout: SplitInfo
    sources: tuple[SourceInfo, ...]
    n_duplicates: int
    documents_sha256: str
    loss: Loss | None = None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """Canonical text: sorted keys, so that equal contents give equal fingerprints."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        if self.loss is None:  # as before there was such a key
            del content["loss"]
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a dataset's folder.

    Raises:
        DataError: the folder is missing, empty, not a dataset, or its manifest is damaged.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(
            f"data.path = {folder}: no such folder; pack one with `trimtab data pack SOURCE --out {folder}`"
        )
    if (folder / MIXTURE).is_file():
        raise DataError(
            f"{folder}: holds several weighted sources; give it as data.path, or single folders of it in data.mixture"
        )
    if not path.is_file():
        what = "is not a packed dataset (it has no manifest.json)" if any(folder.iterdir()) else "is empty"
        raise DataError(f"data.path = {folder}: {what}; pack one with `trimtab data pack SOURCE --out DIR`")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: is damaged ({error}); restore it from a copy or pack the data again") from error
    return parse_manifest(raw, str(path), recorded_fingerprint(folder))


def parse_manifest(raw: bytes, where: str, recorded: str = "") -> Manifest:
    """The manifest that a file's content is.

    Args:
        raw: the content.
        where: path or address, for messages.
        recorded: the fingerprint noted down beside it; empty where there is none.

    Raises:
        DataError: it is not a manifest, damaged, changed, or names files outside of its folder.
    """
    try:
        text = raw.decode("utf-8")
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise DataError(f"{where}: is not the manifest of a dataset; pack the data again into another folder")
        version = content.pop("version", None)
        if version != _VERSION:
            raise DataError(
                f"{where}: has format version {version}, this program reads {_VERSION}; pack the data again"
            )
        manifest = _from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: is damaged ({error}); restore it from a copy or pack the data again") from error
    for shard in (*manifest.train.shards, *manifest.heldout.shards):
        for name in (shard.file, shard.index):
            check_name(name, where)
    if manifest.to_json() != text or recorded not in ("", manifest.fingerprint):
        raise DataError(f"{where}: was changed after packing; restore it from a copy or pack the data again")
    return manifest


def recorded_fingerprint(folder: Path) -> str:
    """The fingerprint that packing noted down beside the manifest; empty where the note is missing."""
    try:
        return noted_fingerprint((folder / PACK_RECORD).read_bytes())
    except OSError:
        return ""


def noted_fingerprint(raw: bytes) -> str:
    """The fingerprint in the content of pack.json; empty where it is none."""
    try:
        return str(json.loads(raw).get("fingerprint", ""))
    except (ValueError, AttributeError):
        return ""


def _from_json(content: dict[str, Any]) -> Manifest:
    for name in ("train", "heldout"):
        shards = tuple(ShardInfo(**shard) for shard in content[name]["shards"])
        content[name] = SplitInfo(**{**content[name], "shards": shards})
    content["sources"] = tuple(SourceInfo(**source) for source in content["sources"])
    if "loss" in content:
        content["loss"] = Loss(**content["loss"])
    return Manifest(**content)


def read_documents(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of documents.jsonl: key, name, split, source, licence, bytes, tokens.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / DOCUMENTS
    try:
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it from a copy or pack the data again") from error
