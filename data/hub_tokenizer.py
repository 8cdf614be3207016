"""A tokenizer of ours as the tokenizer.json that the Hugging Face `tokenizers` library reads."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from data.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_characters


class HubForm(NamedTuple):
    """A tokenizer as the library reads it.

    text: of tokenizer.json. end: the text of its end-of-document token.
    begins: whether the file itself puts that token before a text; else a reader has to do so.
    """

    text: str
    end: str
    begins: bool


def hub_tokenizer(tokenizer: Tokenizer) -> HubForm:
    """The same tokenizer as a tokenizer.json.

    A text is to begin with the end-of-document token, since that is what stood before every document in training. A
    file without a post-processor, or with one that adds other tokens, gets one that does so. A file whose own
    post-processor adds nothing (DeepSeek's) stays as it came, byte for byte: llama.cpp knows a tokenizer by what it
    makes of a text. A vocabulary of bytes becomes a byte-level BPE without merges.
    """
    text = tokenizer.to_json()
    content = json.loads(text)
    if "model" not in content:  # the bytes tokenizer's own file
        content = _bytes()
    end = token_text(content, tokenizer.eod_id)
    known = end in (token["content"] for token in content["added_tokens"])
    if known and _adds_nothing(content.get("post_processor")):
        return HubForm(text, end, begins=False)
    if not known:
        content["added_tokens"].append(_special(tokenizer.eod_id, end))
    content["post_processor"] = _begin_with(end, tokenizer.eod_id)
    return HubForm(json.dumps(content, ensure_ascii=False) + "\n", end, begins=True)


def _adds_nothing(processor: Any) -> bool:
    """Whether a post-processor is there and only moves offsets."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return all(_adds_nothing(one) for one in processor.get("processors", []))
    return processor.get("type") == "ByteLevel"


def _bytes() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {char: byte for byte, char in sorted(byte_characters().items())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(256, END_OF_DOCUMENT)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, END_OF_DOCUMENT: 256},
            "merges": [],
        },
    }


def _special(number: int, text: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, "special": True}


def token_text(content: dict[str, Any], number: int) -> str:
    """The text of a token id in a tokenizer.json's content."""
    for token in content.get("added_tokens", []):
        if token["id"] == number:
            return str(token["content"])
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return next(text for text, one in vocabulary.items() if one == number)
    return str(vocabulary[number][0])  # a list of (text, score)


def _begin_with(text: str, number: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": kind}} for kind, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }
