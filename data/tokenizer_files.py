"""A tokenizer's files: reading tokenizer.json, what to do with other forms, and which token ends a document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
# Names that published tokenizers give their end-of-document token, in the order in which they are looked for where
# no tokenizer_config.json names it.
KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "[SEP]",
)
_CONFIG = "tokenizer_config.json"
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a line of a tiktoken file: base64 and a rank


def read_tokenizer_file(path: Path) -> tuple[str, Any]:
    """The text of a tokenizer.json, and what it holds.

    Raises:
        DataError: it is missing, a folder, another form of tokenizer, or not JSON.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {_way_out_of(path)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read as a tokenizer ({error.strerror}); give a tokenizer.json file"
        ) from error
    try:
        content = raw.decode("utf-8")
        return content, json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_other_form(path, raw) or _not_json(error)}") from error


def end_beside(path: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer's file; None where it names none.

    Raises:
        DataError: the file is there and cannot be read.
    """
    config = path.with_name(_CONFIG)
    if not config.is_file():
        return None
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{config}: cannot be read ({error}); repair it, or move it away from {path.name}") from error
    if isinstance(named, dict):
        named = named.get("content")
    return named if isinstance(named, str) and named else None


def find_end(vocabulary: dict[str, int], spec: str, wanted: str | None, beside: str | None, is_own: bool = True) -> int:
    """The id of the token that ends a document.

    Args:
        vocabulary: all tokens.
        spec: the tokenizer's name, for messages.
        wanted: the token that was asked for.
        beside: the one that tokenizer_config.json names.
        is_own: whether that file is surely about this tokenizer, which is then called tokenizer.json; another one may
            lack the token.

    Raises:
        DataError: it is not in the vocabulary, or none was named and none of the known ones is there.
    """
    if wanted is not None:
        if wanted in vocabulary:
            return vocabulary[wanted]
        raise DataError(f"tokenizer {spec}: the end token {wanted!r} is not in its vocabulary{_special_of(vocabulary)}")
    if beside in vocabulary:
        return vocabulary[beside]
    if beside is not None and is_own:
        raise DataError(
            f"tokenizer {spec}: the eos_token {beside!r} of its {_CONFIG} is not in its vocabulary"
            f"{_special_of(vocabulary)}; name the token that ends a document with --end-token TEXT, or move a "
            f"{_CONFIG} that belongs to another tokenizer away"
        )
    for token in KNOWN_ENDS:
        if token in vocabulary:
            return vocabulary[token]
    raise DataError(
        f"tokenizer {spec}: has none of the known end-of-document tokens ({', '.join(KNOWN_ENDS)})"
        f"{_special_of(vocabulary)}; name the one that ends a document with --end-token TEXT, or put the model's "
        f"{_CONFIG} beside it"
    )


def _special_of(vocabulary: dict[str, int]) -> str:
    """Tokens that look as if they could end a document."""
    found = [token for token in vocabulary if re.fullmatch(r"<\|?[^<>\s]+\|?>|\[[A-Z_]+\]", token)]
    found = [token for token in found if not token.startswith("<0x")]
    return f"; it has {', '.join(sorted(found)[:12])}" if found else ""


def _other_form(path: Path, raw: bytes) -> str:
    """What a file is that is no JSON, and what to do with it; "" if that is not known."""
    there = path.parent
    if _RANKS.match(raw) or "tiktoken" in path.name:
        return (
            f"holds tiktoken's ranks, not a tokenizer.json; {_there(there)}make one from it with "
            f"transformers.convert_slow_tokenizer.TikTokenConverter(vocab_file, pattern), whose pattern and special "
            f"tokens stand in the model's tokenization file, save it, and name the end token with --end-token"
        )
    if path.suffix == ".model":
        return (
            f"is a SentencePiece model, not a tokenizer.json; {_there(there)}make one from its folder with "
            f'transformers.AutoTokenizer.from_pretrained("{there}").save_pretrained("FOLDER") and give '
            f"FOLDER/tokenizer.json"
        )
    if path.name in ("vocab.txt", "merges.txt"):
        return f"is one part of a tokenizer; {_there(there)}give the tokenizer.json of the same tokenizer"
    return ""


def _not_json(error: Exception) -> str:
    return f"cannot be read as a tokenizer ({error}); give a tokenizer.json file"


def _there(folder: Path) -> str:
    whole = folder / "tokenizer.json"
    return f"give {whole}, which lies beside it, or " if whole.is_file() else ""


def _way_out_of(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return f"give {folder / 'tokenizer.json'}"
    for name in ("tokenizer.model", "tiktoken.model", "vocab.txt"):
        if (folder / name).is_file():
            try:
                raw = (folder / name).read_bytes()
            except OSError:
                raw = b""
            return f"its {name} {_other_form(folder / name, raw)}"
    return "give a tokenizer.json file"
