"""Completes texts with a loaded run: prompts in, pieces of text out while they come, figures at the end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from launch.config import ConfigError
from launch.load import LoadedRun, load_run
from launch.text_stream import TextStream
from model.drafts import Drafter, ModelDrafts, ModuleDrafts
from model.generation import Counts, Generation, Request
from model.sampling import Sampling

MODULES = "mtp"  # the name of drafting with the run's own prediction modules
_BEFORE = 8  # tokens of the prompt that the first new token is decoded behind

Show = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """One prompt's text. finished: `eod` (the model ended the document), `length` (the count is reached) or `stop`."""

    prompt: str
    text: str
    new_tokens: int
    finished: str


@dataclass(frozen=True)
class Completions:
    """All prompts' texts, what the model did for them, and how long it took, seconds."""

    completions: list[Completion]
    counts: Counts
    seconds: float

    def figures(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "completions": [asdict(one) for one in self.completions],
            "new_tokens": self.counts.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.counts.tokens / max(self.seconds, 1e-9),
            "forwards": self.counts.steps,
            "drafted": self.counts.drafted,
            "accepted": self.counts.accepted,
            "acceptance": self.counts.acceptance,
        }


def complete(
    loaded: LoadedRun,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int = 0,
    stops: Sequence[str] = (),
    batch: int = 8,
    context: int | None = None,
    begin: Sequence[int] | None = None,
    drafter: Callable[[int], Drafter] | None = None,
    show: Show | None = None,
) -> Completions:
    """Completes prompts, `batch` at a time; prompt i draws with seed + i, whatever the batch it is in.

    Args:
        stops: a text ends before the first of them.
        context: tokens looked at; None is the sequence length of training.
        begin: the ids before a prompt; None is the end-of-document token, which an empty prompt has in any case.
        show: called as show(prompt's number, text) with every piece.
    """
    tokenizer = loaded.tokenizer
    first = [tokenizer.eod_id] if begin is None else list(begin)
    told = [[*first, *tokenizer.encode(prompt).tolist()] or [tokenizer.eod_id] for prompt in prompts]
    requests = [Request(ids, max_new_tokens, seed + number) for number, ids in enumerate(told)]
    began = time.perf_counter()
    generation = Generation(
        loaded.model, requests, sampling, eod_id=tokenizer.eod_id, batch=batch, drafter=drafter,
        max_context=context or loaded.config.data.seq_len,
    )  # fmt: skip
    streams = [TextStream(tokenizer.decode_bytes, stops, ids[len(first) :][-_BEFORE:]) for ids in told]
    pieces: list[list[str]] = [[] for _ in prompts]
    new_tokens, finished = [0] * len(prompts), [""] * len(prompts)

    def give(number: int, text: str) -> None:
        if text:
            pieces[number].append(text)
            if show:
                show(number, text)

    while not generation.done:
        for event in generation.step():
            stream = streams[event.request]
            new_tokens[event.request] += len(event.tokens)
            give(event.request, stream.push(event.tokens))
            if event.finished and not stream.stopped:
                give(event.request, stream.finish())
            finished[event.request] = "stop" if stream.stopped else event.finished
            if stream.stopped:
                generation.cancel(event.request)
    seconds = time.perf_counter() - began
    made = [
        Completion(prompt, "".join(text), count, end)
        for prompt, text, count, end in zip(prompts, pieces, new_tokens, finished, strict=True)
    ]
    return Completions(made, generation.counts, seconds)


def make_drafter(
    loaded: LoadedRun, speculative: str | None, n_drafts: int, device: torch.device
) -> Callable[[int], Drafter] | None:
    """The drafter that `--speculative` names: `mtp`, or the folder of a run with the same tokenizer.

    Raises:
        ConfigError: a run without prediction modules, or with another tokenizer or vocabulary.
    """
    if speculative is None:
        return None
    if speculative == MODULES:
        if not loaded.config.model.num_nextn_predict_layers:
            raise ConfigError(
                ["--speculative mtp: the run's model has no prediction module (model.num_nextn_predict_layers = 0); "
                 "name the folder of a smaller run with the same tokenizer instead"]
            )  # fmt: skip
        return lambda rows: ModuleDrafts(loaded.model, rows)
    second = load_run(Path(speculative), device)
    found = _differences(loaded.tokenizer, second.tokenizer)
    if second.config.model.vocab_size != loaded.config.model.vocab_size:
        found.append(
            f"model.vocab_size is {second.config.model.vocab_size} there and {loaded.config.model.vocab_size} here"
        )
    if found:
        raise ConfigError(
            [f"--speculative {speculative}: {text}; draft with a run on the same packed data" for text in found]
        )
    return lambda rows: ModelDrafts(second.model, rows, n_drafts)


def _differences(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    if ours.fingerprint == theirs.fingerprint:
        return []
    return [f"its tokenizer {theirs.spec} is not this run's {ours.spec}, or was trained on other texts"]
