"""What a task of lm-evaluation-harness asks of generated text: honoured as a whole, or refused by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task names no count
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # of new tokens
# Arguments whose value changes nothing, and so are no wish; any other value of them is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "n": (1,), "repetition_penalty": (1,), "length_penalty": (1,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "typical_p": (1,), "min_p": (0,), "min_tokens": (0,),
    "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "early_stopping": (False,), "use_cache": (True, False),
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """How one text is to be written. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens."""

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0


def wish_of(given: Mapping[str, Any], normalize: Callable[..., Any], prompt_tokens: int = 0) -> Wish:
    """Reads `generation_kwargs`; an argument that is null counts as not given.

    Args:
        given: of a task or a request.
        normalize: `lm_eval.models.utils.normalize_gen_kwargs`, which knows the names of the count of new tokens.
        prompt_tokens: of the text that is written on from, which `max_length` includes.

    Raises:
        ValueError: names every argument that cannot be honoured.
    """
    kwargs = {name: value for name, value in given.items() if value is not None}
    problems = [
        f"{name} = {json.dumps(value, default=str)} is not honoured"
        for name, value in kwargs.items()
        if name not in ("until", "do_sample", "temperature", "top_k", "top_p", "max_length", *COUNTS)
        and value not in NEUTRAL.get(name, ())
    ]
    counts = {name: kwargs[name] for name in COUNTS if name in kwargs}
    if len(set(counts.values())) > 1:
        problems.append(f"{' and '.join(f'{name} = {value}' for name, value in counts.items())} contradict each other")
    until = kwargs.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(one, str) for one in until):
        problems.append(f"until = {until!r} is neither a text nor a list of texts")
        kwargs.pop("until")
    numbers = {
        name: kwargs[name] for name in ("temperature", "top_k", "top_p", "max_length", *COUNTS) if name in kwargs
    }
    odd = [name for name, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    problems += [f"{name} = {numbers[name]!r} is not a number" for name in odd]
    if not isinstance(kwargs.get("do_sample", False), bool):
        problems.append(f"do_sample = {kwargs['do_sample']!r} is neither true nor false")
    if problems:
        raise ValueError("; ".join(problems))
    found = normalize({name: value for name, value in kwargs.items() if name in (*COUNTS, "until", "do_sample",
                       "temperature")}, DEFAULT_NEW_TOKENS)  # fmt: skip
    new_tokens = int(found["max_gen_toks"])
    if "max_length" in kwargs and not counts:
        new_tokens = int(kwargs["max_length"]) - prompt_tokens
    temperature = float(found.get("temperature", 1.0)) if found["do_sample"] else 0.0
    top_k, top_p = int(kwargs.get("top_k", 0)), float(kwargs.get("top_p", 1.0))
    if new_tokens < 1:
        problems.append(f"{new_tokens} new tokens are asked for; at least 1 is written")
    if found["do_sample"] and temperature == 0:
        problems.append("do_sample = true with temperature = 0 contradict each other")
    if temperature < 0:
        problems.append(f"temperature = {temperature} is negative")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p} is not above 0 and at most 1")
    if problems:
        raise ValueError("; ".join(problems))
    return Wish(tuple(one for one in until if one), new_tokens, temperature, max(0, top_k), top_p)
