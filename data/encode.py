"""The readings behind packing: survey the documents, train the tokenizer, encode and write the shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.corpus import Document, Source
from data.encoding import Encoding
from data.errors import DataError
from data.heldout import HeldoutChoice, split_tail
from data.leftout import DUPLICATE, Account, LeftOut
from data.lossiness import LossMeter
from data.manifest import DOCUMENTS, MANIFEST, Manifest, SourceInfo, SplitInfo
from data.progress import PROGRESS, PackState
from data.shards import ShardWriter
from data.tokenizer import DEEPSEEK, ByteTokenizer, Tokenizer, deepseek_file, load_tokenizer, train_bpe

_BATCH_BYTES = 4 << 20
_TRAINING_BYTES = 64 << 20
_SAVE_BYTES = 64 << 20  # of text between two notes of how far it came

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, bytes done, bytes in total); the total is 0 while it is not known."""


@dataclass(frozen=True)
class Entry:
    """What the survey remembers of a document that is kept."""

    name: str
    n_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Survey:
    """The documents to keep by name, the number of duplicates left out, (documents, bytes) kept by source, and what
    became of each source."""

    entries: dict[str, Entry]
    n_duplicates: int
    by_source: tuple[tuple[int, int], ...]
    accounts: tuple[Account, ...]

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.entries.values())


@dataclass(frozen=True)
class Part:
    """What becomes one dataset: its sources, what the survey kept of them, and which documents are held out."""

    opened: list[Source]
    found: Survey
    choice: HeldoutChoice


def _documents(opened: list[Source]) -> Iterator[tuple[int, Document]]:
    """Every document of every source with its source's number; names get their source in front if there are several."""
    for number, source in enumerate(opened):
        for document in source.read():
            if len(opened) > 1:
                document = Document(f"{source.name}/{document.name}", document.data, document.origin, document.licence)
            yield number, document


def refuse_false(accounts: Sequence[Account]) -> None:
    """Refuses sources of which more text would be left out than taken, or of which only a licence would be taken.

    Raises:
        DataError: there is such a source.
    """
    found = [problem for account in accounts if (problem := account.problem())]
    if found:
        raise DataError(
            "; ".join(found) + ". Unpack or convert what was left out, or pack the rest alone with --allow-left-out"
        )


def survey(opened: list[Source], report: Progress, digests: set[bytes]) -> Survey:
    """First reading: which documents to keep; of identical ones the first.

    Args:
        opened: the sources.
        digests: of the documents that other surveys kept; those kept here are added.
    """
    entries: dict[str, Entry] = {}
    totals = [[0, 0] for _ in opened]
    duplicates = [LeftOut() for _ in opened]
    done = 0
    for number, document in _documents(opened):
        done += len(document.data)
        report("reading", done, 0)
        digest = hashlib.blake2b(document.data, digest_size=16).digest()
        if digest in digests:
            duplicates[number].add(DUPLICATE, document.name, len(document.data))
            continue
        if document.name in entries:
            raise DataError(f"{document.origin}: two documents are called {document.name}; rename one of the files")
        digests.add(digest)
        entries[document.name] = Entry(document.name, len(document.data), digest)
        totals[number][0] += 1
        totals[number][1] += len(document.data)
    accounts = []
    for source, again in zip(opened, duplicates, strict=True):
        account = source.account()
        account.left.reasons.update(again.reasons)
        accounts.append(account)
    if not entries:
        reasons = "; ".join(f"{account.source}: {account.left or 'it has no rows'}" for account in accounts)
        raise DataError(
            f"the sources hold no text (left out: {reasons}); give text or code in UTF-8, JSON lines or Parquet, "
            f"unpacked where they are in an archive"
        )
    n_duplicates = sum(again.n for again in duplicates)
    return Survey(
        entries, n_duplicates, tuple((n_documents, n_bytes) for n_documents, n_bytes in totals), tuple(accounts)
    )


def _kept(opened: list[Source], entries: dict[str, Entry]) -> Iterator[Document]:
    """A later reading: the documents that the first one kept, refused if they changed in between."""
    seen = 0
    for _, document in _documents(opened):
        entry = entries.get(document.name)
        if entry is None:
            continue
        if hashlib.blake2b(document.data, digest_size=16).digest() != entry.digest:
            raise DataError(f"{document.origin}: {document.name} changed while it was packed; pack again")
        seen += 1
        yield document
    if seen != len(entries):
        raise DataError(f"{len(entries) - seen} documents vanished while they were packed; pack again")


def make_tokenizer(spec: str, parts: Sequence[Part], report: Progress, end_token: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` asks for; "bpe:N" is trained on what is not held out, at most 64 MiB of it."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec == DEEPSEEK:
        return load_tokenizer(deepseek_file(), DEEPSEEK)
    if not spec.startswith("bpe:"):
        return load_tokenizer(spec, eod_token=end_token)
    total = sum(part.found.n_bytes for part in parts)
    share = min(1.0, _TRAINING_BYTES / total)

    def texts() -> Iterator[str]:
        done = 0
        for part in parts:
            entries, choice = part.found.entries, part.choice
            for document in _kept(part.opened, entries):
                # the digest is uniform, so its first bytes draw an even, repeatable sample of a large corpus
                drawn = int.from_bytes(entries[document.name].digest[:4], "little") < share * 2**32
                if document.name in choice.names or not drawn:
                    continue
                tail = choice.tail_bytes if document.name == choice.tail else 0
                data = split_tail(document.data, tail)[0] if tail else document.data
                done += len(data)
                report("training the tokenizer", done, int(total * share))
                yield data.decode("utf-8")

    return train_bpe(texts(), int(spec[4:]))


def write_dataset(
    folder: Path,
    part: Part,
    encoder: Tokenizer,
    shard_bytes: int,
    encoding: Encoding,
    report: Progress,
    allow_lossy: bool = False,
) -> Manifest | None:
    """Last reading: encodes, writes shards, indexes, documents.jsonl and the manifest; the tokenizer is in the folder.

    What an interrupted packing has left in the folder is kept. None on processes that only encode.

    Raises:
        DataError: a document's tokens hold the end token, or the tokenizer loses too much of the text.
    """
    opened, found, choice = part.opened, part.found, part.choice
    dtype = np.dtype("<u2") if encoder.vocab_size <= 1 << 16 else np.dtype("<u4")
    state = PackState(**encoding.share(asdict(PackState.load(folder)) if encoding.writes else None))
    documents = islice(_split(_kept(opened, found.entries), choice), state.number, None)
    if not encoding.writes:
        texts = ([document.text for _, document in batch] for batch in _batches(documents))
        for _ in encoding.encoded(texts, encoder):
            pass
        return None
    writers = {split: ShardWriter(folder, split, shard_bytes) for split in ("train", "heldout")}
    for split, saved in state.writers.items():
        writers[split].restore(saved)
    (folder / DOCUMENTS).touch()
    meter = LossMeter(encoder, state, found.n_bytes, allow_lossy)
    unsaved = 0
    try:
        with (folder / DOCUMENTS).open("r+b") as listing:
            listing.truncate(state.listing_bytes)
            listing_sha256 = hashlib.sha256(listing.read())
            waiting: deque[list[tuple[str, Document]]] = deque()

            def texts_of(batches: Iterator[list[tuple[str, Document]]]) -> Iterator[list[str]]:
                for batch in batches:
                    waiting.append(batch)
                    yield [document.text for _, document in batch]

            for encoded in encoding.encoded(texts_of(_batches(documents)), encoder):
                for (split, document), ids in zip(waiting.popleft(), encoded, strict=True):
                    if (ids == encoder.eod_id).any():
                        raise DataError(_end_inside(document, encoder, ids))
                    if meter.everything or split == "heldout" or state.number == 0:
                        meter.take(document.name, document.data, ids)
                    tokens = np.append(ids, np.uint32(encoder.eod_id)).astype(dtype)
                    key = f"{state.number:08d}"
                    writers[split].add(key, tokens, document.data if split == "heldout" else None)
                    row = {
                        "key": key,
                        "name": document.name,
                        "split": split,
                        "source": document.origin,
                        "licence": document.licence,
                        "bytes": len(document.data),
                        "tokens": len(tokens),
                    }
                    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
                    listing.write(line)
                    listing_sha256.update(line)
                    state.listing_bytes += len(line)
                    state.counts[split][0] += 1
                    state.counts[split][1] += len(document.data)
                    state.number += 1
                    state.done += len(document.data)
                    unsaved += len(document.data)
                if unsaved >= _SAVE_BYTES:
                    listing.flush()
                    os.fsync(listing.fileno())
                    state.writers = {split: writer.state() for split, writer in writers.items()}
                    state.save(folder)
                    unsaved = 0
                report("encoding", state.done, found.n_bytes)
        shards = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    loss = meter.result()
    splits = {}
    for split, written in shards.items():
        n_documents, n_bytes = state.counts[split]
        splits[split] = SplitInfo(n_documents, sum(shard.n_tokens for shard in written), n_bytes, written)
    manifest = Manifest(
        tokenizer=encoder.spec,
        tokenizer_sha256=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        eod_id=encoder.eod_id,
        lossless=state.lossless,
        dtype=dtype.str,
        train=splits["train"],
        heldout=splits["heldout"],
        sources=tuple(
            SourceInfo(source.name, source.licence, *found.by_source[i], source.left.counts())
            for i, source in enumerate(opened)
        ),
        n_duplicates=found.n_duplicates,
        documents_sha256=listing_sha256.hexdigest(),
        loss=loss,
    )
    (folder / PROGRESS).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _end_inside(document: Document, encoder: Tokenizer, ids: np.ndarray) -> str:
    where = int(np.argmax(ids == encoder.eod_id))
    return (
        f"{document.origin}: {document.name}: token {where} of {len(ids)} is the end-of-document token "
        f"{encoder.eod_id} of {encoder.spec}, whose vocabulary holds that token's text as a word, and the document "
        f"would be cut there; change that text in the document, or pack with bytes, bpe:N or another --end-token"
    )


def _split(documents: Iterator[Document], choice: HeldoutChoice) -> Iterator[tuple[str, Document]]:
    """Gives each document its split; the one whose end is held out becomes two."""
    for document in documents:
        if document.name == choice.tail:
            head, tail = split_tail(document.data, choice.tail_bytes)
            if head and tail:
                yield "train", Document(document.name, head, document.origin, document.licence)
                yield "heldout", Document(f"{document.name}#end", tail, document.origin, document.licence)
                continue
        yield ("heldout" if document.name in choice.names else "train"), document


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Groups documents into batches of about `_BATCH_BYTES`."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
