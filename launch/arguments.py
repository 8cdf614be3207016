"""What the options of every command may hold, checked in one place before a command runs."""

import argparse
import difflib
from collections.abc import Iterator
from typing import Any

from launch import bounds
from launch.config import Config
from launch.schema import places

WHOLE, MEASURE = "[1, 1e9]", "(0, 1e9]"  # of an option that is not named here: a count, a size
OR_NONE = "[0, 1e9]"
RANGES = {
    "seed": "[0, 9223372036854775808)",
    "step": OR_NONE,
    "temperature": "[0, 1000]",
    "top_p": "(0, 1]",
    "heldout": "[0, 1)",
    "fewshot": OR_NONE,
    "keep_every": OR_NONE,
    "latency_us": "[0, 1e9]",
    "index_documents": OR_NONE,
    "documents": OR_NONE,
    "base": OR_NONE,
    "global_batch": OR_NONE,
    "ep_size": OR_NONE,
    "ranks_per_node": OR_NONE,
    "warm_up": OR_NONE,
    "shard_mb": "[0.000001, 1e6]",
    "shard_gb": "[0.000001, 1e6]",
    "trimtab generate top_k": OR_NONE,
}


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all its subcommands, at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in dict.fromkeys(action.choices.values()):
                yield from commands(one)


def legal(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """The range of an option that takes numbers; None for any other."""
    if action.type not in (int, float):
        return None
    usual = WHOLE if action.type is int else MEASURE
    return RANGES.get(f"{parser.prog} {action.dest}", RANGES.get(action.dest, usual))


def problems(options: argparse.Namespace) -> list[str]:
    """A sentence for every option whose value is out of range or empty."""
    parser, found = options.parser, []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if not action.option_strings or value is None or value == action.default:
            continue
        name = max(action.option_strings, key=len)
        if value == "" and action.type is not str and action.dest not in ("prompt",):
            found.append(f"{name} is empty; give a value, or leave it out")
        elif (text := legal(parser, action)) and (sentence := bounds.wrong(name, value, text)):
            found.append(sentence)
    return found


def add_refused(found: list[str], options: argparse.Namespace) -> None:
    """Adds what `problems` found to a command's own sentences, but for options that these name already."""
    said = {sentence.split()[0] for sentence in found}
    found += [sentence for sentence in getattr(options, "refused", ()) if sentence.split()[0] not in said]


def unknown(words: list[str], parser: argparse.ArgumentParser) -> str:
    """What to say about words that a command does not take: what they may have been meant to be."""
    hints = []
    known = [name for action in parser._actions for name in action.option_strings]
    takes_keys = any(action.dest == "assignments" for action in parser._actions)
    for word in words:
        name = word.partition("=")[0]
        key = name.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        dotted = places(Config).get(key.rpartition(".")[2], [])
        if word.startswith("-") and takes_keys and dotted:
            hints.append(f"{name}: keys of the configuration are written as {dotted[0]}=VALUE")
        elif word.startswith("-") and near:
            hints.append(f"{name}: did you mean {near[0]}?")
    return f"unrecognized arguments: {' '.join(words)}" + "".join(f"\n  {hint}" for hint in hints)


def add_json(parser: Any, what: str = "one JSON object") -> None:
    """The option --json, worded alike everywhere."""
    parser.add_argument("--json", action="store_true", help=f"print {what} alone on standard output, text on error")
