"""A tokenizer of ours as the tokenizer.json that the Hugging Face `tokenizers` library reads."""

from __future__ import annotations

import json
from typing import Any

from data.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_characters


def hub_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """The same tokenizer as a tokenizer.json, and the text of its end-of-document token.

    One thing is changed in a given file, its post-processor: a text begins with the end-of-document token, since that
    is what stood before every document in training. A vocabulary of bytes becomes a byte-level BPE without merges.
    """
    content = json.loads(tokenizer.to_json())
    if tokenizer.spec == "bytes":
        content = _bytes()
    end = _name_of(content, tokenizer.eod_id)
    if end not in (token["content"] for token in content["added_tokens"]):
        content["added_tokens"].append(_special(tokenizer.eod_id, end))
    content["post_processor"] = _begin_with(end, tokenizer.eod_id)
    return content, end


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


def _name_of(content: dict[str, Any], number: int) -> str:
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
