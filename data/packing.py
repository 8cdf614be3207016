"""The steps of a packing, of one dataset or of one for each weighted source: survey, tokenizer, shards, publishing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.corpus import TEXT_FIELD, Source
from data.encode import Part, Progress, make_tokenizer, refuse_false, survey, write_dataset
from data.encoding import Encoding, HereEncoding, ProcessEncoding
from data.errors import DataError
from data.heldout import choose_heldout
from data.manifest import MANIFEST, MIXTURE, PACK_RECORD, TOKENIZER, Manifest, read_manifest
from data.node_cache import place_file
from data.progress import work_folder
from data.tokenizer import DEEPSEEK, load_tokenizer

Content = TypeVar("Content")


@dataclass(frozen=True)
class Settings:
    """How to pack; see `data.pack.pack`."""

    tokenizer: str = "bpe:4096"
    shard_mb: float = 64
    heldout: float = 0.02
    heldout_kib: float = 256
    workers: int = 1
    encoding: Encoding | None = None
    progress: Progress | None = None
    field: str = TEXT_FIELD
    end_token: str | None = None
    allow_lossy: bool = False
    allow_left_out: bool = False


def end_of(settings: Settings) -> int | None:
    """The id of the token that ends a document, of a given tokenizer.json; None for the tokenizers that have one end.

    Raises:
        DataError: the file cannot be used, or none of its tokens is known to end a document.
    """
    if settings.tokenizer in ("bytes", DEEPSEEK) or settings.tokenizer.startswith("bpe:"):
        return None
    return load_tokenizer(settings.tokenizer, eod_token=settings.end_token).eod_id


def write_and_publish(
    groups: Sequence[tuple[str, list[Source]]],
    out: Path,
    signature: str,
    settings: Settings,
    finish: Callable[[Path, list[Manifest]], dict],
) -> bool:
    """Packs each group of sources into a dataset, with one tokenizer, and puts the whole folder in place.

    Args:
        groups: the folder inside of `out` (empty for `out` itself) and the sources of each dataset. Of identical
            documents only the first is kept, in all groups together.
        out, signature: the folder, and the hash of everything that goes into it.
        finish: called with the unfinished folder and the manifests; writes what belongs beside them and returns what
            pack.json shall say, with the key "fingerprint".

    Returns:
        Whether another process has put the same content in place first.

    Raises:
        DataError: as `data.pack.pack`.
    """
    started = time.perf_counter()
    report = settings.progress or (lambda phase, done, total: None)
    replace = out.is_dir() and any(out.iterdir())
    digests: set[bytes] = set()
    parts = []
    for _, opened in groups:
        found = survey(opened, report, digests)
        sizes = [(entry.name, entry.n_bytes) for entry in found.entries.values()]
        limit = int(settings.heldout_kib * 1024) // len(groups)
        parts.append(Part(opened, found, choose_heldout(sizes, settings.heldout, limit)))
    accounts = [account for part in parts for account in part.found.accounts]
    if not settings.allow_left_out:
        refuse_false(accounts)
    here: Encoding = settings.encoding or HereEncoding()
    temporary = Path(here.share(str(work_folder(out, signature)) if here.writes else None))
    folders = [temporary / name for name, _ in groups]
    if settings.workers > 1:
        here = ProcessEncoding(settings.workers, folders[0] / TOKENIZER)
    raced = False
    try:
        if here.writes and not (folders[0] / TOKENIZER).exists():
            made = make_tokenizer(settings.tokenizer, parts, report, settings.end_token)
            place_file(folders[0] / TOKENIZER, made.to_json().encode())
        here.share(None)  # the file is there from here on
        spec = settings.tokenizer
        if spec != DEEPSEEK and not spec.startswith("bpe:"):
            spec = Path(spec).name
        eod_id = here.share(end_of(settings) if here.writes else None)
        encoder = load_tokenizer(folders[0] / TOKENIZER, spec, eod_id=eod_id)
        for (name, _), part, folder in zip(groups, parts, folders, strict=True):
            if here.share(here.writes and (folder / MANIFEST).exists()):
                continue  # finished before the interruption
            if here.writes:
                place_file(folder / TOKENIZER, encoder.to_json().encode())
            named = report if not name else _naming(report, name)
            write_dataset(folder, part, encoder, int(settings.shard_mb * (1 << 20)), here, named, settings.allow_lossy)
        if here.writes:
            manifests = [read_manifest(folder) for folder in folders]
            for folder, manifest in zip(folders, manifests, strict=True):
                if folder != temporary:
                    note = {"fingerprint": manifest.fingerprint, "python": platform.python_version()}
                    (folder / PACK_RECORD).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            record = {
                "signature": signature,
                **finish(temporary, manifests),
                "accounts": [account.to_json() for account in accounts],
                "python": platform.python_version(),
                "seconds": round(time.perf_counter() - started, 3),
            }
            (temporary / PACK_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            raced = _publish(temporary, out, signature, replace)
        here.share(None)  # the folder is in place
    except DataError:
        if here.writes:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if here.writes:
        shutil.rmtree(temporary, ignore_errors=True)
    return raced


def _naming(report: Progress, name: str) -> Progress:
    return lambda phase, done, total: report(f"{phase} {name}", done, total)


def reusable(out: Path, signature: str, overwrite: bool, intact: Callable[[Path], Content]) -> Content | None:
    """What `intact` says of a folder that was packed from the same inputs; None where packing may go ahead.

    Raises:
        DataError: the folder must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    packed = (out / MANIFEST).is_file() or (out / MIXTURE).is_file()
    if not packed or not (out / PACK_RECORD).is_file():
        raise DataError(f"{out}: exists and is not a packed dataset, it is left as it is; choose another folder")
    if _recorded_signature(out) == signature:
        try:
            return intact(out)
        except DataError:
            return None  # damaged, and the same inputs are here to make it anew
    if not overwrite:
        raise DataError(
            f"{out}: holds a dataset that was packed from other inputs or options; choose another folder, remove it, "
            f"or replace it with --overwrite"
        )
    return None


def _recorded_signature(folder: Path) -> str:
    try:
        return str(json.loads((folder / PACK_RECORD).read_text(encoding="utf-8")).get("signature", ""))
    except (OSError, ValueError, AttributeError):
        return ""


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
