"""A run's model under EleutherAI's lm-evaluation-harness, on task files that lie on this machine."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.tokenizer import Tokenizer
from launch.config import ConfigError
from launch.data_commands import progress_line
from launch.scoring import Pair, score
from model.transformer import Transformer

PACKAGE = "lm-eval"
WRITTEN_AT_ONCE = 64  # texts between two reports of progress


class Complete(Protocol):
    """Writes on from prompts."""

    def __call__(
        self, prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str]:
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
) -> dict[str, dict[str, float]]:
    """Evaluates tasks of the harness.

    Nothing is downloaded: the harness and its data library are told to stay offline, so a task's data must lie on this
    machine (`dataset_path: json` with `data_files`, for example). A task file that names functions runs the Python
    beside it; use such only from people whom you trust.

    Args:
        model, tokenizer: of a run.
        complete: for tasks that want text.
        tasks: names of tasks, or of groups of tasks.
        folder: where task files (YAML) lie; None for those that the harness brings along.
        window, batch_size: as in `score`.
        fewshot: examples before each question; None leaves it to the task.
        limit: only so many documents of each task.
        seed: of the order of examples and of drawn text.

    Returns:
        task -> metric -> value, with standard errors as the harness names them (`acc_stderr`).

    Raises:
        ConfigError: the harness is not installed, a task is not known, or its data is not here.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
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
        result = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), task_manager=manager, num_fewshot=fewshot, limit=limit,
            bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            [f"the data of {', '.join(tasks)} is not on this machine ({error}); name local files in the task's YAML"]
        ) from error
    return {task: _metrics(values) for task, values in result["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; other filters stay part of the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    }


def make_adapter(
    model: Transformer, tokenizer: Tokenizer, complete: Complete, window: int, batch_size: int, seed: int
) -> Any:
    """The harness's `TemplateLM` over a model of ours; the harness must be installed.

    A text begins with the end-of-document token, as a document does in training.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False else [tokenizer.eod_id, *ids]

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            pairs = [Pair(context, continuation) for _, context, continuation in requests]
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
            alike: dict[str, list[int]] = {}  # requests that can share a batch
            for number, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
            written, done = [""] * len(requests), 0
            for numbers in alike.values():
                wish = requests[numbers[0]].args[1]
                drawn = wish.get("do_sample", float(wish.get("temperature", 0) or 0) > 0)
                until = wish.get("until", [])
                for first in range(0, len(numbers), WRITTEN_AT_ONCE):
                    some = numbers[first : first + WRITTEN_AT_ONCE]
                    texts = complete(
                        [requests[number].args[0] for number in some],
                        stop=[until] if isinstance(until, str) else list(until),
                        max_new_tokens=int(wish.get("max_gen_toks", 256)),
                        temperature=float(wish.get("temperature", 1.0)) if drawn else 0.0,
                        seed=seed + first,
                    )
                    for number, text in zip(some, texts, strict=True):
                        written[number] = text
                    done += len(some)
                    if not disable_tqdm:
                        progress_line("writing", done, len(requests))
            return written

    return Adapter()
