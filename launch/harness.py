"""A run's model under EleutherAI's lm-evaluation-harness, on task files that lie on this machine."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.tokenizer import Tokenizer
from launch.config import ConfigError
from launch.data_commands import progress_line
from launch.generation_wishes import Wish, wish_of
from launch.scoring import Pair, score
from model.transformer import Transformer

PACKAGE = "lm-eval"
WRITTEN_AT_ONCE = 64  # texts between two reports of progress
OF_THE_TEXT = ("bits_per_byte", "byte_perplexity", "word_perplexity")  # metrics per byte or word of the raw text


class Complete(Protocol):
    """Writes on from prompts."""

    def __call__(
        self, prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int,
        top_k: int = 0, top_p: float = 1.0,
    ) -> list[str]:  # fmt: skip
        """The new texts, without the stop string that ended them; prompt i draws with seed + i."""


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    complete: Complete,
    tasks: Sequence[str],
    folder: Path | None,
    *,
    window: int,
    batch_size: int = 8,
    fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_download: bool = False,
    lossy: str = "",
) -> dict[str, dict[str, float]]:
    """Evaluates tasks of the harness.

    Unless told otherwise nothing is downloaded: the harness and its data library are told to stay offline, so a task's
    data must lie on this machine (`dataset_path: json` with `data_files`, for example). A task file that names
    functions runs the Python beside it; use such only from people whom you trust.

    Args:
        model, tokenizer: of a run.
        complete: for tasks that want text.
        tasks: names of tasks, or of groups of tasks.
        folder: where task files (YAML) lie; None for those that the harness brings along.
        window, batch_size: as in `score`.
        fewshot: examples before each question; None leaves it to the task.
        limit: only so many documents of each task.
        seed: of the order of examples and of drawn text.
        allow_download: the harness may fetch a task's data from the Hugging Face Hub.
        lossy: why bits per byte would not be true; then metrics of bytes and words are left out.

    Returns:
        task -> metric -> value, with standard errors as the harness names them (`acc_stderr`).

    Raises:
        ConfigError: the harness is not installed, a task is not known, its data is not here, it asks for text in a way
            that is not honoured, or a document cannot be scored; names task and document.
    """
    if not allow_download:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import lm_eval
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise ConfigError(
            [f"--tasks needs the package {PACKAGE} ({error}); pip install {PACKAGE}==0.4.13 beside the pinned torch"]
        ) from error
    if folder is not None and not folder.is_dir():
        raise ConfigError([f"--task-folder {folder} is not a folder; give the one that holds the tasks' YAML files"])
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)[:20])
        raise ConfigError([f"task {task} is not known; known are {known or 'none'}" for task in unknown])
    adapter = make_adapter(model, tokenizer, complete, window, batch_size, seed)
    try:
        problems = []
        for name, task in _built(tasks, lambda name: get_task_dict([name], manager)):
            if task.OUTPUT_TYPE == "generate_until":
                try:
                    wish_of(task.config.generation_kwargs or {}, normalize_gen_kwargs, prompt_tokens=-1)
                except ValueError as error:
                    problems.append(_not_honoured(name, error))
        if problems:
            raise ConfigError(problems)
        result = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), task_manager=manager, num_fewshot=fewshot, limit=limit,
            bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        way = "could not be fetched" if allow_download else "is not on this machine"
        out = "" if allow_download else ", or add --allow-download to fetch it from the Hugging Face Hub"
        raise ConfigError(
            [f"the data of {', '.join(tasks)} {way} ({error}); name local files in the task's YAML{out}"]
        ) from error
    return {task: _metrics(values, lossy) for task, values in result["results"].items()}


def _metrics(values: dict[str, Any], lossy: str) -> dict[str, float]:
    """`acc,none` -> `acc`; other filters stay part of the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
        and not (lossy and name.startswith(OF_THE_TEXT))
    }  # fmt: skip


def _built(names: Sequence[str], build: Callable[[str], dict[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Every task of these names, built by the harness from its YAML and data.

    Raises:
        ConfigError: the harness cannot build one; the harness looks at a task's first document for that.
    """
    for name in names:
        try:
            found = build(name)
        except (ConnectionError, FileNotFoundError):
            raise
        except Exception as error:  # whatever a task's YAML, functions and first document make the harness raise
            raise ConfigError(
                [
                    f"task {name} cannot be built from its YAML and data: {type(error).__name__}: {error}; look at its "
                    "keys and at its first document, whose text, choices and answer must not be empty"
                ]
            ) from error
        yield from _tasks_in(found)


def _tasks_in(found: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Every task of what `get_task_dict` gives, groups opened."""
    for name, task in found.items():
        if isinstance(task, dict):
            yield from _tasks_in(task)
        else:
            yield str(name), task


def _not_honoured(where: str, error: ValueError) -> str:
    return (
        f"task {where}: generation_kwargs: {error}; change the task's YAML (until, max_gen_toks, do_sample, "
        "temperature, top_k and top_p are honoured), or export the run and use `lm_eval --model hf`"
    )


def make_adapter(
    model: Transformer, tokenizer: Tokenizer, complete: Complete, window: int, batch_size: int, seed: int
) -> Any:
    """The harness's `TemplateLM` over a model of ours; the harness must be installed.

    A text begins with the end-of-document token, as a document does in training.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False else [tokenizer.eod_id, *ids]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._asked = requests
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            pairs = [Pair(context, continuation) for _, context, continuation in requests]
            refuse_unscorable(self._asked, [text for (_, text), _, _ in requests], pairs, window)
            found = score(model, pairs, window, batch_size, None if disable_tqdm else partial(progress_line, "scoring"))
            return [(one.log_probability, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    tokenizer.encode(text).tolist(), prefix_token=tokenizer.eod_id, max_seq_len=window, context_len=1
                )
                pairs = [Pair(*make_disjoint_window(piece)) for piece in windows]
                totals.append(sum(one.log_probability for one in score(model, pairs, window, batch_size)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            alike: dict[Wish, list[int]] = {}  # requests that can share a batch
            problems = []
            for number, request in enumerate(requests):
                prompt, given = request.args[0], request.args[1]
                n_prompt = len(tokenizer.encode(prompt)) + 1 if given.get("max_length") is not None else 0
                try:
                    alike.setdefault(wish_of(given, normalize_gen_kwargs, n_prompt), []).append(number)
                except ValueError as error:
                    problems.append(_not_honoured(f"{request.task_name}, document {request.doc_id}", error))
            if problems:
                raise ConfigError(problems[:10])
            written, done = [""] * len(requests), 0
            for wish, numbers in alike.items():
                for first in range(0, len(numbers), WRITTEN_AT_ONCE):
                    some = numbers[first : first + WRITTEN_AT_ONCE]
                    texts = complete(
                        [requests[number].args[0] for number in some],
                        stop=list(wish.stop),
                        max_new_tokens=wish.max_new_tokens,
                        temperature=wish.temperature,
                        seed=seed + first,
                        top_k=wish.top_k,
                        top_p=wish.top_p,
                    )
                    for number, text in zip(some, texts, strict=True):
                        written[number] = text
                    done += len(some)
                    if not disable_tqdm:
                        progress_line("writing", done, len(requests))
            return written

    return Adapter()


def refuse_unscorable(asked: Sequence[Any], texts: Sequence[str], pairs: Sequence[Pair], window: int) -> None:
    """Refuses continuations without a token, and those that do not fit into the window.

    Args:
        asked: the harness's requests, in the order of the pairs: each knows its task and document.
        texts: the continuations as they were asked for.

    Raises:
        ConfigError: names task, document and text of the first ten.
    """
    problems = []
    for request, text, pair in zip(asked, texts, pairs, strict=True):
        where = (
            f"task {request.task_name}, document {request.doc_id}, choice {request.idx}: the continuation {text[:60]!r}"
        )
        if not pair.continuation:
            problems.append(
                f"{where} has no token of its own behind its context; give it a text that does not merge with what "
                "stands before it, or leave the document out"
            )
        elif len(pair.continuation) > window:
            problems.append(
                f"{where}{'...' if len(text) > 60 else ''} has {len(pair.continuation)} tokens, and the window is "
                f"{window}; raise --window, or shorten it"
            )
    if problems:
        more = [f"and {len(problems) - 10} more such documents"] if len(problems) > 10 else []
        raise ConfigError(problems[:10] + more)
