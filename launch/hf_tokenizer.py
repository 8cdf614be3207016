"""The tokenizer's files of a Hugging Face folder: what AutoTokenizer, vLLM and lm-eval read."""

import json
from collections.abc import Mapping
from typing import Any

from data.hub_tokenizer import hub_tokenizer
from data.tokenizer import Tokenizer
from launch.run_tokenizer import FILE, KeptTokenizer

# The plainest form of a conversation, for tools that insist on one: "role: text", a blank line after every turn but an
# assistant's, which the end token closes: a model that is tuned on it learns where to stop. `generation` marks what an
# assistant says, for tools that train on that alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "assistant:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['role'] }}: {{ message['content'] }}\n\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_template(begins: bool) -> str:
    """The template; where the tokenizer does not put the begin token before a text itself, the template does.

    Never both: a conversation that is made text first and tokens later would begin twice.
    """
    return CHAT_TEMPLATE if begins else "{{ bos_token }}" + CHAT_TEMPLATE


def tokenizer_files(tokenizer: Tokenizer, max_length: int, kept: KeptTokenizer | None = None) -> dict[str, str]:
    """File names and their contents.

    Args:
        max_length: the model's longest context in tokens.
        kept: an imported model's own files, which are given back as they came; the rest is made.
    """
    imported = kept is not None and kept.imported
    form = hub_tokenizer(tokenizer)
    special = {"bos_token": form.end, "eos_token": form.end, "pad_token": form.end}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(form.begins),
    }
    if not form.begins:
        settings["add_bos_token"] = True  # transformers 4.57, 5.24 and llama.cpp go by the post-processor
    made = {
        FILE: tokenizer.to_json() if imported else form.text,
        "tokenizer_config.json": _text(settings),
        "special_tokens_map.json": _text(special),
        "chat_template.jinja": chat_template(form.begins),
        "generation_config.json": generation_config(tokenizer.eod_id),
    }
    if kept is None or not imported:
        return made
    if "tokenizer_config.json" in kept.files:  # its own settings; what it does without is not invented
        return {FILE: made[FILE], **kept.files}
    return {**made, **kept.files}


def begins_texts(tokenizer: Tokenizer, kept: KeptTokenizer | None) -> bool:
    """Whether the exported tokenizer begins a text as the model knows it; an imported one is as it was."""
    return (kept is not None and kept.imported) or hub_tokenizer(tokenizer).begins


def generation_config(eod_id: int) -> str:
    """generation_config.json: where a text starts and ends; the end token pads."""
    return _text({"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id})


def _text(table: Mapping[str, object]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
