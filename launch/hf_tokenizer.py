"""The tokenizer's files of a Hugging Face folder: what AutoTokenizer, vLLM and lm-eval read."""

import json
from collections.abc import Mapping

from data.hub_tokenizer import hub_tokenizer
from data.tokenizer import Tokenizer

# The plainest form of a conversation, for tools that insist on one: "role: text", a blank line between turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """File names and their contents.

    Args:
        max_length: the model's longest context in tokens.
    """
    content, end = hub_tokenizer(tokenizer)
    special = {"bos_token": end, "eos_token": end, "pad_token": end}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False) + "\n",
        "tokenizer_config.json": _text(settings),
        "special_tokens_map.json": _text(special),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def generation_config(eod_id: int) -> str:
    """generation_config.json: where a text starts and ends; the end token pads."""
    return _text({"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id})


def _text(table: Mapping[str, object]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
