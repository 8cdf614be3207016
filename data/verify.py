"""Verification: reads every byte of a dataset back and names each damaged file and each lost sample."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.crc32c import crc32c
from data.errors import DataError
from data.index import map_records, read_header
from data.manifest import DOCUMENTS, MANIFEST, MIXTURE, PACK_RECORD, TOKENIZER, Manifest, ShardInfo, read_documents
from data.members import REGULAR, leads_out, member_problem
from data.places import AddressPlace, FolderPlace, Place, scratch_folder
from data.shards import TEXT_SUFFIX, TOKENS_SUFFIX, ShardReader
from data.storage import MissingError, StorageError, is_remote, local_path
from data.tarwalk import BLOCK, Break, Member, parse_header, walk
from data.weighted import read_mixture

_CHUNK = 4 << 20
_OWN = frozenset((MANIFEST, MIXTURE, TOKENIZER, DOCUMENTS, PACK_RECORD))
_SHARD_NAME = re.compile(r"(train|heldout)-\d+\.(tar|idx)")


@dataclass(frozen=True)
class LostSample:
    """A sample that cannot be used as it was packed: its key, its document's name, and why."""

    key: str
    name: str
    problem: str


@dataclass(frozen=True)
class Damage:
    """One damaged file: its name inside the folder, what is wrong with it, and the samples that it loses."""

    file: str
    problem: str
    lost: tuple[LostSample, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.problem}"]
        lines += [f"  sample {sample.key} ({sample.name}): {sample.problem}" for sample in self.lost]
        return "\n".join(lines)


def verify(
    path: str | Path, progress: Callable[[str, int, int], None] | None = None, *, deadline_s: float = 300.0,
    foreign: list[str] | None = None,
) -> list[Damage]:  # fmt: skip
    """Checks a dataset's manifest, tokenizer, document list, indexes and shards; an empty list means that all is well.

    Each shard is compared with its checksum in the manifest and walked member by member as a tar reader would; where
    anything differs, each of its samples is checked on its own. Of weighted sources every one is checked.

    Args:
        path: the dataset's folder or address; a remote file is copied here for its check and removed again.
        progress: called as progress("verifying", bytes done, bytes in total).
        deadline_s: longest time for one part of a remote file, all tries together.
        foreign: receives the names of files and folders that other programs left in the dataset's folder, such as
            another reader's indexes. They are no part of the dataset and are not judged.

    Raises:
        DataError: the folder is missing or empty, there is nothing to verify; or the storage does not answer.
    """
    report = progress or (lambda phase, done, total: None)
    try:
        mixture = read_mixture(path, deadline_s)
    except StorageError:
        raise
    except DataError as error:
        return [Damage(MIXTURE, str(error))]
    if mixture is None:
        return _verify_one(path, report, deadline_s, foreign)[1]
    found: list[Damage] = []
    for source in mixture.sources:
        where = f"{str(path).rstrip('/')}/{source.name}"
        try:
            beside: list[str] = []
            fingerprint, damages = _verify_one(where, _naming(report, source.name), deadline_s, beside)
            if foreign is not None:
                foreign += (f"{source.name}/{name}" for name in beside)
        except StorageError as error:
            if not isinstance(error, MissingError):
                raise
            damages, fingerprint = [Damage(MANIFEST, f"is missing ({error})")], source.fingerprint
        except DataError as error:
            damages, fingerprint = [Damage(MANIFEST, str(error))], source.fingerprint
        if fingerprint not in ("", source.fingerprint):
            damages = [Damage(MANIFEST, f"is another dataset's than {MIXTURE} names"), *damages]
        found += (replace(damage, file=f"{source.name}/{damage.file}") for damage in damages)
    return found


def _naming(report: Callable[[str, int, int], None], name: str) -> Callable[[str, int, int], None]:
    return lambda phase, done, total: report(f"{phase} {name}", done, total)


def _verify_one(
    path: str | Path, report: Callable[[str, int, int], None], deadline_s: float, foreign: list[str] | None
) -> tuple[str, list[Damage]]:
    """The fingerprint (empty where the manifest is damaged) and the damages of one dataset."""
    if not is_remote(path):
        return _verify_place(FolderPlace(local_path(path)), report, foreign)
    with scratch_folder() as scratch:
        return _verify_place(AddressPlace(str(path), deadline_s, Path(scratch)), report, foreign)


def _verify_place(
    place: Place, report: Callable[[str, int, int], None], foreign: list[str] | None
) -> tuple[str, list[Damage]]:
    try:
        manifest = place.manifest()
    except DataError as error:
        if not any(name.endswith(".tar") for name in place.names()):
            raise
        return "", [Damage(MANIFEST, str(error))]
    found: list[Damage] = []
    place.bring(TOKENIZER, manifest.tokenizer_sha256)
    if _sha256(place.folder / TOKENIZER) != manifest.tokenizer_sha256:
        found.append(Damage(TOKENIZER, "is missing or not the tokenizer of the packing; token ids have no meaning"))
    place.bring(DOCUMENTS, manifest.documents_sha256)
    documents = _document_rows(place.folder, manifest, found)
    splits = [("train", manifest.train), ("heldout", manifest.heldout)]
    total = sum(shard.n_bytes for _, split in splits for shard in split.shards)
    done = ended = 0

    def arrived(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report("verifying", min(done, total), total)

    for name, split in splits:
        rows = iter(documents.get(name, []))
        for shard in split.shards:
            expected = [next(rows, ("?", "?")) for _ in range(shard.n_documents)]
            place.bring(shard.index)
            place.bring(shard.file, shard.sha256, arrived)
            found += _check_shard(place.folder, shard, expected, manifest, held_out=name == "heldout")
            place.done(shard.index)
            place.done(shard.file)
            done = ended = ended + shard.n_bytes
            report("verifying", done, total)
    known = {file for _, split in splits for shard in split.shards for file in (shard.file, shard.index)}
    for file in place.names():
        if file in known or file in _OWN:
            continue
        if _SHARD_NAME.fullmatch(file):  # a name that packing gives: readers that take every shard would take it
            found.append(Damage(file, "does not belong to the dataset (the manifest does not list it)"))
        elif foreign is not None:
            foreign.append(file)
    return manifest.fingerprint, found


def _document_rows(folder: Path, manifest: Manifest, found: list[Damage]) -> dict[str, list[tuple[str, str]]]:
    """(key, name) of every document by split, in shard order, from documents.jsonl as far as it is readable."""
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    if _sha256(folder / DOCUMENTS) != manifest.documents_sha256:
        found.append(Damage(DOCUMENTS, "is missing or changed; names and licences of documents are not reliable"))
    try:
        for row in read_documents(folder):
            rows[row["split"]].append((row["key"], row["name"]))
    except (DataError, KeyError, TypeError):
        return {}  # reported above: a readable file with the right checksum has these fields
    return rows


def _check_shard(
    folder: Path, shard: ShardInfo, expected: list[tuple[str, str]], manifest: Manifest, *, held_out: bool
) -> Iterator[Damage]:
    """Yields the damages of one shard and its index."""
    records, index_problem = _read_index(folder, shard)
    if index_problem:
        yield Damage(shard.index, index_problem)
    path = folder / shard.file
    if not path.is_file():
        yield Damage(shard.file, "is missing", tuple(LostSample(key, name, "missing") for key, name in expected))
        return
    problems = []
    size = path.stat().st_size
    if size != shard.n_bytes:
        problems.append(f"has {size} bytes instead of {shard.n_bytes}")
    elif _sha256(path) != shard.sha256:
        problems.append("has another content than was packed (wrong sha256)")
    reader = ShardReader(folder, [shard.file])
    try:
        members, broken = _members(reader, size)
        problems += _surprises(members, expected, held_out)
        if broken:
            problems.append(f"at byte {broken.offset}: {broken.problem}")
        if not problems:
            return
        if records is None:
            lost = list(_lost_by_name(members, expected))
        else:
            lost = list(_lost_by_record(reader, records, expected, manifest, held_out))
        yield Damage(shard.file, "; ".join(problems), tuple(lost))
    finally:
        reader.close()


def _read_index(folder: Path, shard: ShardInfo) -> tuple[np.ndarray | None, str]:
    """The index's records, or None and what is wrong with the index."""
    try:
        header = read_header(folder / shard.index)
        if (header.shard_sha256, header.records_crc) != (shard.sha256, shard.index_crc32c):
            return None, "is the index of another shard or packing (stale)"
        return map_records(folder / shard.index, header), ""
    except DataError as error:
        return None, str(error).removeprefix(f"{folder / shard.index}: ")


def _members(reader: ShardReader, size: int) -> tuple[list[Member], Break | None]:
    """What a tar reader sees of a shard, and where it stops too early."""
    if size == 0:
        return [], Break(0, "the file is empty")
    members: list[Member] = []
    for item in walk(lambda offset, nbytes: reader.read(0, offset, nbytes), size):
        if isinstance(item, Break):
            return members, item
        members.append(item)
    return members, None


def _surprises(members: list[Member], expected: list[tuple[str, str]], held_out: bool) -> Iterator[str]:
    """Members that do not belong there: repeated names, names that are not of this shard, missing samples."""
    suffixes = (TOKENS_SUFFIX, TEXT_SUFFIX) if held_out else (TOKENS_SUFFIX,)
    wanted = {key + suffix for key, _ in expected for suffix in suffixes}
    counts = Counter(member.name for member in members)
    for member in members:
        if member.kind not in REGULAR:
            yield member_problem(member.name, member.kind) or f"holds the folder {member.name!r}"
    for name, count in counts.items():
        if count > 1:
            yield f"holds the member {name} {count} times"
        if name not in wanted and "?" + TOKENS_SUFFIX not in wanted:
            unsafe = " (its name leads out of the folder, never extract it)" if leads_out(name) else ""
            yield f"holds a member {name!r} that was not packed{unsafe}"
    if not members and expected:
        yield "holds no sample that a tar reader can see"


def _lost_by_record(
    reader: ShardReader, records: np.ndarray, expected: list[tuple[str, str]], manifest: Manifest, held_out: bool
) -> Iterator[LostSample]:
    """Checks each sample at the place that the index gives it."""
    for record, (key, name) in zip(records, expected, strict=True):
        offset, nbytes = int(record["offset"]), int(record["nbytes"])
        raw = reader.read(0, offset, nbytes)
        header = parse_header(reader.read(0, offset - BLOCK, BLOCK))
        tokens = np.frombuffer(raw[: len(raw) // 4 * 4], manifest.dtype)
        text_at = offset + nbytes + -nbytes % BLOCK
        if len(raw) < nbytes:
            problem = f"cut off, {len(raw)} of {nbytes} bytes are left"
        elif crc32c(raw) != int(record["crc32c"]):
            problem = f"wrong checksum at bytes {offset} to {offset + nbytes}"
        elif len(tokens) and int(tokens.max()) >= manifest.vocab_size:
            problem = f"token {int(tokens.max())} is outside the vocabulary of {manifest.vocab_size}"
        elif isinstance(header, str):
            problem = f"{header}; the index still reads it, tar readers lose it and all samples behind it"
        elif header.name != key + TOKENS_SUFFIX:
            problem = f"its tar header names it {header.name!r}; the index still reads it, tar readers do not"
        elif held_out and (problem := _text_problem(reader, text_at, key)):
            pass
        else:
            continue
        yield LostSample(key, name, problem)


def _text_problem(reader: ShardReader, at: int, key: str) -> str:
    """What is wrong with a held-out sample's raw text, empty if nothing shows."""
    header = parse_header(reader.read(0, at, BLOCK))
    if isinstance(header, str) or header.name != key + TEXT_SUFFIX:
        return "its raw text is lost"
    return "" if len(reader.read(0, at + BLOCK, header.size)) == header.size else "its raw text is cut off"


def _lost_by_name(members: list[Member], expected: list[tuple[str, str]]) -> Iterator[LostSample]:
    """Without an index: the samples whose members a tar reader does not reach; contents cannot be judged."""
    seen = {member.name for member in members}
    for key, name in expected:
        if key + TOKENS_SUFFIX not in seen:
            yield LostSample(key, name, "not found in the shard, and there is no index to look further")


def _sha256(path: Path) -> str:
    """sha256 of a file, empty where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
