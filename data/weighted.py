"""A folder of several weighted sources: a packed dataset for each, and mixture.json, which names them with weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.manifest import MIXTURE, PACK_RECORD, Manifest, noted_fingerprint, recorded_fingerprint
from data.storage import SAFE_NAME, MissingError, Storage, check_name, is_remote, local_path

_FORMAT = "trimtab-mixture"
_VERSION = 1


@dataclass(frozen=True)
class WeightedSource:
    """A source to pack: its name, its path (as `data.pack.pack` takes it), its share of the sequences in any unit, and
    where its rows have their text ("" for the packing's own field)."""

    name: str
    path: str
    weight: float = 1.0
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> WeightedSource:
        """The source that NAME=PATH[@WEIGHT] is; an @ that no number follows belongs to the path.

        Raises:
            DataError: there is no name or no path.
        """
        name, _, rest = text.partition("=")
        path, at, weight = rest.rpartition("@")
        try:
            found = cls(name, path, float(weight)) if at else cls(name, rest)
        except ValueError:
            found = cls(name, rest)
        if not found.name or not found.path:
            raise DataError(f"--source {text}: is not NAME=PATH[@WEIGHT]; write for example code=~/code@0.7")
        return found


def check_weighted(sources: Sequence[WeightedSource]) -> list[str]:
    """Every reason why sources cannot be packed together."""
    found = []
    names = [source.name for source in sources]
    for source in sources:
        if not SAFE_NAME.fullmatch(source.name) or source.name.lower().endswith((".json", ".jsonl")):
            found.append(f"source {source.name!r}: is not a plain name; use letters, digits, - and _, for example code")
        if not 0 <= source.weight < float("inf"):
            found.append(f"source {source.name}: weight {source.weight} is not a number from 0 up; use for example 0.7")
    if len({name.lower() for name in names}) < len(names):
        found.append(f"sources {', '.join(names)}: a name is there twice; give each source a name of its own")
    if sources and not any(source.weight for source in sources):
        found.append("all weights are 0; give at least one source a positive weight")
    return found


@dataclass(frozen=True)
class MixtureSource:
    """One source: its name, which is its folder's too, its weight, licence, what its training split holds (tokens with
    one end token a document, bytes of raw text), its held-out documents, and its dataset's fingerprint."""

    name: str
    weight: float
    licence: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    n_heldout: int
    fingerprint: str


@dataclass(frozen=True)
class Mixture:
    """What mixture.json says: the sources in their order, and the tokenizer that all were packed with."""

    tokenizer: str
    sources: tuple[MixtureSource, ...]

    @classmethod
    def of(cls, weights: Sequence[tuple[str, float]], manifests: Sequence[Manifest]) -> Mixture:
        """The mixture of packed datasets, with (name, weight) of each."""
        found = []
        for (name, weight), manifest in zip(weights, manifests, strict=True):
            train, n_heldout = manifest.train, manifest.heldout.n_documents
            found.append(
                MixtureSource(
                    name, float(weight), manifest.sources[0].licence, train.n_documents, train.n_tokens, train.n_bytes,
                    n_heldout, manifest.fingerprint,
                )
            )  # fmt: skip
        return cls(manifests[0].tokenizer, tuple(found))

    def to_json(self) -> str:
        """Canonical text: equal contents give equal bytes."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def fingerprint(self) -> str:
        """sha256 of the file, which is noted down beside it."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


def parse_mixture(raw: bytes, where: str, recorded: str = "") -> Mixture:
    """The mixture that a file's content is; arguments and errors as `data.manifest.parse_manifest`."""
    try:
        text = raw.decode("utf-8")
        content = json.loads(text)
        if content.pop("format") != _FORMAT or content.pop("version") != _VERSION:
            raise ValueError("its format or version is not this program's")
        content["sources"] = tuple(MixtureSource(**source) for source in content["sources"])
        mixture = Mixture(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: is damaged ({error}); restore it from a copy or pack the data again") from error
    for source in mixture.sources:
        check_name(source.name, where)
    if mixture.to_json() != text or recorded not in ("", mixture.fingerprint):
        raise DataError(
            f"{where}: was changed after packing; restore it, and give other weights in data.weights instead"
        )
    return mixture


def read_mixture(path: str | Path, deadline_s: float = 300.0) -> Mixture | None:
    """The mixture in a folder or at an address; None where there is no mixture.json.

    Raises:
        DataError: it is damaged or changed, or the storage does not answer.
    """
    if not is_remote(path):
        folder = local_path(path)
        file = folder / MIXTURE
        return parse_mixture(file.read_bytes(), str(file), recorded_fingerprint(folder)) if file.is_file() else None
    storage = Storage(str(path), deadline_s)
    try:
        raw = storage.read(MIXTURE)
    except MissingError:
        return None
    recorded = ""
    with suppress(MissingError):
        recorded = noted_fingerprint(storage.read(PACK_RECORD))
    return parse_mixture(raw, f"{storage.address}/{MIXTURE}", recorded)


def resolved(config: DataConfig) -> DataConfig:
    """The same section, with the sources and weights of a folder of weighted sources written out.

    Where `data.path` names such a folder, `data.mixture` becomes its sources' folders and `data.weights` their weights;
    weights or a curriculum that are given stay. Any other section comes back as it is.

    Raises:
        DataError: as `read_mixture`.
    """
    if config.mixture or config.mode != "indexed" or not config.path:
        return config
    mixture = read_mixture(config.path, config.deadline_s)
    if mixture is None:
        return config
    folders = tuple(f"{str(config.path).rstrip('/')}/{source.name}" for source in mixture.sources)
    weights = () if config.curriculum else config.weights or tuple(source.weight for source in mixture.sources)
    return replace(config, mixture=folders, weights=weights)
