"""The tokenizer that a run's model knows, kept in the run's folder, and what disagrees with it.

RUN/tokenizer/tokenizer.json       the file of the imported model, or of the data that the run was started on
RUN/tokenizer/...                  what else an imported model brought: tokenizer_config.json, its chat template, ...
RUN/tokenizer/kept.json            where it came from, its sha256, its end token, the special ids of config.json

A run of an earlier version has no such folder; then the data's tokenizer is taken, as it always was.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.dataset import describe
from data.errors import DataError
from data.hub_tokenizer import hub_tokenizer, token_text
from data.storage import is_remote
from data.tokenizer import Tokenizer, load_tokenizer

FOLDER, FILE, KEPT = "tokenizer", "tokenizer.json", "kept.json"
# What a published folder has beside tokenizer.json; each is kept as it came and exported as it came.
COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip
_UNREAD = ("tiktoken.model", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class KeptTokenizer:
    """What a run keeps.

    tokenizer: ready for use, with the model's own end token. imported: it came with an imported model.
    files: what an imported model brought beside it, by name. ids: its config.json's special ids, where it had them.
    """

    path: Path
    tokenizer: Tokenizer
    imported: bool
    files: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)


def read_published(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, ending a text as its tokenizer_config.json says; None for no such file.

    Raises:
        DataError: tokenizer.json is not one, or has no known end token and tokenizer_config.json names none of its own.
    """
    file = folder / FILE
    return load_tokenizer(file, eod_token=end_token(folder)) if file.is_file() else None


def end_token(folder: Path) -> str | None:
    """The eos_token of a folder's tokenizer_config.json; None where it names none."""
    try:
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    content = told.get("content") if isinstance(told, dict) else told
    return content if isinstance(content, str) and content else None


def unread_tokenizers(folder: Path) -> list[str]:
    """Tokenizer files of other kinds, where a Hugging Face folder has no tokenizer.json."""
    return [] if (folder / FILE).is_file() else [name for name in _UNREAD if (folder / name).is_file()]


def keep_published(source: Path, run: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Copies a Hugging Face folder's tokenizer and what belongs to it into a run.

    Args:
        tokenizer: from `read_published`. config: the folder's config.json.
    """
    target = run / FOLDER
    target.mkdir()
    for name in (FILE, *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    ids = {name: config[name] for name in _IDS if name in config}
    _write_kept(target, tokenizer, imported=True, ids=ids)


def keep_data_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer of a run's data into the run, in place of what it had."""
    target, draft = run / FOLDER, run / f".{FOLDER}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / FILE).write_text(tokenizer.to_json(), encoding="utf-8", newline="")
    _write_kept(draft, tokenizer, imported=False, ids={})
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _write_kept(target: Path, tokenizer: Tokenizer, imported: bool, ids: Mapping[str, Any]) -> None:
    content = json.loads(tokenizer.to_json())
    told = {
        "spec": tokenizer.spec,
        "sha256": hashlib.sha256((target / FILE).read_bytes()).hexdigest(),
        "end_token": token_text(content, tokenizer.eod_id) if "model" in content else None,
        "imported": imported,
        "ids": dict(ids),
    }
    (target / KEPT).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def kept_tokenizer(run: Path) -> KeptTokenizer | None:
    """What a run keeps; None for a run of an earlier version.

    Raises:
        DataError: a file was changed, or `tokenizers` is needed and not installed.
    """
    folder = run / FOLDER
    if not (folder / KEPT).is_file():
        return None
    try:
        told = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        same = hashlib.sha256((folder / FILE).read_bytes()).hexdigest() == told["sha256"]
        spec, end, imported, ids = (told[key] for key in ("spec", "end_token", "imported", "ids"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / KEPT}: cannot be read ({error!r}); copy the run's folder again") from error
    if not same:
        raise DataError(f"{folder / FILE}: is not the file that the run was made with; copy the run's folder again")
    files = {name: (folder / name).read_text(encoding="utf-8") for name in COMPANIONS if (folder / name).is_file()}
    tokenizer = load_tokenizer(folder / FILE, spec, eod_token=end)
    return KeptTokenizer(folder / FILE, tokenizer, imported, files, ids)


def begin_ids(kept: KeptTokenizer | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before a prompt: the end-of-document token, or what an imported model's own tokenizer puts there.

    The latter is `bos_token` where tokenizer_config.json says `add_bos_token`, nothing where it says false, and else
    what the post-processor of tokenizer.json adds.
    """
    if kept is None or not kept.imported:
        return (tokenizer.eod_id,)
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    settings = json.loads(kept.files.get("tokenizer_config.json", "{}"))
    if "add_bos_token" in settings:
        told = settings.get("bos_token")
        number = inner.token_to_id(told.get("content", "") if isinstance(told, dict) else str(told))
        return () if number is None or not settings["add_bos_token"] else (number,)
    one = inner.encode("a")
    text = one.special_tokens_mask.index(0) if 0 in one.special_tokens_mask else 0
    return tuple(one.ids[:text])


def data_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration's data.

    Raises:
        DataError: the data or its tokenizer cannot be read.
    """
    from data.foreign import foreign_tokenizer  # not where a command starts that needs neither
    from data.mixture import open_data

    if data.mode != "indexed":
        return foreign_tokenizer(data)
    if not data.mixture and not is_remote(data.path) and (Path(data.path) / "manifest.json").is_file():
        described = describe(data.path)  # the shards need not be whole
        return load_tokenizer(Path(data.path) / FILE, described.tokenizer, eod_id=described.eod_id)
    with open_data(data) as dataset:
        return dataset.tokenizer


def identity(tokenizer: Tokenizer) -> str:
    """sha256 of what turns a text into ids and back, hex: the same for one tokenizer in different files.

    Begin and end tokens that a file adds around a text, truncation and padding do not count: packing uses none of them.
    """
    import tokenizers

    plain = json.loads(tokenizers.Tokenizer.from_str(hub_tokenizer(tokenizer).text).to_str())
    for name in ("post_processor", "truncation", "padding", "version"):
        plain.pop(name, None)
    plain["added_tokens"] = sorted(plain["added_tokens"], key=lambda token: token["id"])
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def same_ids(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same ids."""
    if ours.fingerprint == theirs.fingerprint:
        return True
    if ours.spec == theirs.spec == "bytes":
        return True
    return identity(ours) == identity(theirs)


def mismatch(where: str, theirs: Tokenizer, file: Path, ours: Tokenizer) -> str | None:
    """Says that data has another tokenizer than the model; None where they agree.

    Args:
        where: the data, as the user named it. file: the model's tokenizer.json.
    """
    if same_ids(ours, theirs):
        return None
    return (
        f"{where} has another tokenizer ({theirs.spec}, vocabulary {theirs.vocab_size:,}, sha256 "
        f"{theirs.fingerprint[:12]}) than the model ({file}, vocabulary {ours.vocab_size:,}, sha256 "
        f"{ours.fingerprint[:12]}): its token ids mean other texts to the model"
    )


def other_end(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """Says that documents end with another token than the model's texts; None where they agree."""
    if theirs.eod_id == ours.eod_id:
        return None
    return (
        f"documents of the data end with token {theirs.eod_id}, the model's own texts with token {ours.eod_id} "
        "(eos_token of its tokenizer_config.json)"
    )


ACCEPT = "tokenizer"  # the key of --accept-change


def training_problems(run: Path, data: DataConfig, builtin: str, accepted: tuple[str, ...]) -> list[str]:
    """Why a run with a checkpoint cannot be trained on this data: its ids are not the model's.

    Args:
        builtin: the corpus that is still to be packed, "" for none. accepted: keys of --accept-change.
    """
    if ACCEPT in accepted:
        return []
    way_out = (
        f"give data that was packed with it (trimtab data pack SOURCE --tokenizer {run / FOLDER / FILE}), or train the "
        f"model on other ids from here on with --accept-change {ACCEPT}"
    )
    try:
        kept = kept_tokenizer(run)
        if kept is None:
            return []
        if builtin:
            unpacked = f"data.path = {data.path} is not packed yet, and {builtin} would get a tokenizer of its own"
            return [f"{unpacked}, which is not the imported model's; {way_out}"] if kept.imported else []
        wrong = None
        if not _known_by_checksum(data, kept.tokenizer):
            wrong = mismatch(f"data.path = {data.path}", data_tokenizer(data), kept.path, kept.tokenizer)
    except DataError as error:
        return [str(error)]
    return [] if wrong is None else [f"{wrong}; {way_out}"]


def keep_for_training(run: Path, data: DataConfig, accepted: tuple[str, ...]) -> str | None:
    """Keeps the tokenizer of a checked run's data where the run has none, or another that was given up.

    Data at an address is not opened for it. Returns what there is to say: why none is kept, or that one was given up.
    """
    try:
        kept = kept_tokenizer(run)
        remote = data.mode == "indexed" and any(is_remote(path) for path in (data.path, *data.mixture) if path)
        if (kept is not None and kept.imported and ACCEPT not in accepted) or (kept is None and remote):
            return None
        if kept is not None and _known_by_checksum(data, kept.tokenizer):
            return None
        theirs = data_tokenizer(data)
        if kept is not None and same_ids(kept.tokenizer, theirs):
            return None
        keep_data_tokenizer(run, theirs)
    except DataError as error:
        return f"run: it keeps no tokenizer of its own ({error})"
    return None if kept is None else f"run: the tokenizer {kept.tokenizer.spec} gave way to the data's {theirs.spec}"


def _known_by_checksum(data: DataConfig, ours: Tokenizer) -> bool:
    """Whether the manifest of one packed dataset already names the model's tokenizer.json; reads no tokenizer."""
    if data.mode != "indexed" or data.mixture:
        return False
    try:
        return describe(data.path, data.remote()).tokenizer_sha256 == ours.fingerprint
    except DataError:  # a folder of weighted sources has no manifest of its own
        return False
