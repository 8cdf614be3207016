"""`trimtab eval`: held-out loss, bits per byte and perplexity; tasks of lm-evaluation-harness; HumanEval."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cluster.context import EXIT_OK
from launch.arguments import add_json, add_refused
from launch.config import ConfigError
from launch.data_commands import progress_line
from launch.output import print_json

RESULTS = "evaluations.jsonl"


def add_eval_command(commands: Any) -> None:
    """Adds `eval` to a parser's subcommands."""
    parser = commands.add_parser(
        "eval",
        help="Measure a run's checkpoint: held-out loss, tasks, HumanEval.",
        description="Without --tasks and --humaneval: loss, perplexity and bits per byte of the held-out documents, "
        f"each token predicted once. What is found is also added to RUN/{RESULTS}.",
        epilog="example: trimtab eval runs/debug --tasks my_task --task-folder tasks --json",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="a checkpoint's step (default: the newest)")
    parser.add_argument("--data", type=Path, help="held-out documents of this dataset instead of the run's own")
    parser.add_argument("--window", type=int, help="tokens of context (default: data.seq_len of the run)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences in a forward, texts written together (default: 8)"
    )
    parser.add_argument("--quantize", choices=("int8", "int4"), help="round the weights first, see docs/generation.md")
    parser.add_argument("--tasks", help="names of lm-evaluation-harness tasks, joined by commas")
    parser.add_argument("--task-folder", type=Path, help="where the tasks' YAML files lie (default: the harness's own)")
    parser.add_argument(
        "--allow-download", action="store_true", help="let the harness fetch tasks' data from the Hugging Face Hub"
    )
    parser.add_argument("--fewshot", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument("--limit", type=int, help="only so many documents of a task, problems of HumanEval")
    parser.add_argument("--humaneval", action="store_true", help="complete HumanEval's functions and run their tests")
    parser.add_argument("--samples", type=int, default=1, help="completions a problem (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of HumanEval's completions; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of one completion of HumanEval")
    parser.add_argument("--jobs", type=int, default=2, help="programs that run at a time (default: 2)")
    parser.add_argument(
        "--accept-weaker-sandbox", action="store_true",
        help="run completions although this machine cannot take network and files away from them",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of completions and few-shot examples (default: 0)")
    add_json(parser)
    parser.set_defaults(run_command=_eval, joins_refused=True)


def _eval(options: Any) -> int:
    _check(options)
    import torch

    from launch.allocator import keep_freed_memory
    from launch.completions import complete
    from launch.generate_commands import QUANTIZED
    from launch.load import load_run
    from model.quantize import quantize
    from model.sampling import Sampling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    loaded = load_run(options.run, device, options.step)
    window = options.window or loaded.config.data.seq_len
    figures: dict[str, Any] = {"step": loaded.saved.step, "window": window, "quantized": options.quantize}
    if options.quantize:
        size = quantize(loaded.model, QUANTIZED[options.quantize])
        figures["weight_bytes"] = {"before": size.before, "after": size.after}

    def write(
        prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int,
        top_k: int = 0, top_p: float = 1.0,
    ) -> list[str]:  # fmt: skip
        made = complete(
            loaded, prompts, Sampling(temperature, top_k, top_p), max_new_tokens=max_new_tokens, seed=seed, stops=stop,
            batch=options.batch_size, context=window, begin=loaded.begin,
        )  # fmt: skip
        return [one.text for one in made.completions]

    if options.tasks:
        from launch.byte_figures import why_no_bits
        from launch.harness import run_tasks

        figures["tasks"] = run_tasks(
            loaded.model, loaded.tokenizer, write, options.tasks.split(","), options.task_folder, window=window,
            batch_size=options.batch_size, fewshot=options.fewshot, limit=options.limit, seed=options.seed,
            allow_download=options.allow_download,
            lossy="" if loaded.dataset is None else why_no_bits(loaded.dataset),
        )  # fmt: skip
        for task, metrics in figures["tasks"].items():
            _show(task, metrics)
    if options.humaneval:
        figures["humaneval"] = _humaneval(options, write, loaded.saved.step)
    if not options.tasks and not options.humaneval:
        figures["heldout"] = _heldout(options, loaded, window)
    if loaded.dataset is not None:
        loaded.dataset.close()
    with (options.run / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), **figures}) + "\n")
    if options.json:
        print_json(figures)
    return EXIT_OK


def _check(options: Any) -> None:
    """Everything that can be wrong before the model is read, all at once."""
    problems = []
    if not (options.run / "config.toml").is_file():
        problems.append(f"{options.run} is not a run: it has no config.toml; give the folder of a run")
    for name in ("window", "batch_size", "samples", "max_new_tokens", "jobs", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} = {value} must be at least 1")
    if options.temperature < 0:
        problems.append(f"--temperature = {options.temperature} is negative; use 0 for greedy completions")
    if options.samples > 1 and options.temperature == 0:
        problems.append(f"--samples = {options.samples} greedy completions would all be the same; raise --temperature")
    if options.task_folder is not None and not options.tasks:
        problems.append("--task-folder without --tasks: name the tasks to run")
    if options.allow_download and not options.tasks:
        problems.append("--allow-download without --tasks: name the tasks whose data may be fetched")
    if options.data is not None and (options.tasks or options.humaneval):
        problems.append("--data is for held-out loss; leave out --tasks and --humaneval")
    add_refused(problems, options)
    if options.humaneval and not problems:
        from launch.humaneval import read_problems
        from launch.sandbox import missing_protections

        read_problems()
        missing = () if options.accept_weaker_sandbox else missing_protections()
        if missing:
            problems.append(
                f"--humaneval: this machine lacks {' and '.join(missing)}, so programs that a model wrote would run "
                "too freely; run it on a Linux machine that has them, or in a container of your own with "
                "--accept-weaker-sandbox"
            )
    if problems:
        raise ConfigError(problems)


def _heldout(options: Any, loaded: Any, window: int) -> dict[str, Any]:
    from data.dataset import open_dataset
    from kernels.products import onednn_is_better, products_through
    from launch.byte_figures import byte_figures, why_no_bits
    from launch.evaluate import evaluate

    dataset = loaded.dataset
    if options.data is not None:
        dataset = open_dataset(options.data)
        theirs, ours = dataset.tokenizer.to_json(), loaded.tokenizer.to_json()
        if theirs != ours:
            dataset.close()
            raise ConfigError(
                [f"--data {options.data} was packed with another tokenizer than the run's data; pack it with that one"]
            )
    if dataset is None:
        raise ConfigError([f"{loaded.no_data}; give a packed dataset with --data"])
    documents = list(dataset.heldout_documents())
    if not documents:
        raise ConfigError([f"{dataset.path} holds no document out; pack it again with --heldout above 0"])
    with products_through(onednn_is_better()):  # as in training, so that both find the same figure to the last bit
        result = evaluate(
            loaded.model, documents, dataset.manifest.eod_id, window, partial(progress_line, "held-out windows"),
            options.batch_size,
        )  # fmt: skip
    bits = byte_figures(result, why_no_bits(dataset))
    if options.data is not None:
        dataset.close()
    found: dict[str, Any] = {
        "documents": result.n_documents, "tokens": result.n_tokens, "bytes": result.raw_bytes, "loss": result.loss,
        "perplexity": math.exp(result.loss), **bits,
    }  # fmt: skip
    _show(f"held-out, step {loaded.saved.step}", found)
    return found


def _humaneval(options: Any, complete: Any, step: int) -> dict[str, float]:
    from launch.humaneval import complete_problems, judge, pass_at_k, read_problems, write_samples

    problems = dict(list(read_problems().items())[: options.limit])
    completions = complete_problems(
        complete, problems.values(), n_samples=options.samples, temperature=options.temperature,
        max_new_tokens=options.max_new_tokens, seed=options.seed, progress=partial(progress_line, "completing"),
    )  # fmt: skip
    samples = judge(
        completions, problems, accept_weaker=options.accept_weaker_sandbox, jobs=options.jobs,
        progress=partial(progress_line, "running tests"),
    )  # fmt: skip
    where = options.run / f"humaneval-step-{step:08d}.jsonl"
    write_samples(where, samples)
    found = {"problems": len(problems), **pass_at_k(samples)}
    _show(f"HumanEval, completions for each problem: {options.samples}, in {where}", found)
    return found


def _show(title: str, figures: Mapping[str, float | str | None]) -> None:
    print(title)
    for name, value in figures.items():
        if isinstance(value, str):
            print(f"  {name:<24}{value}")
        elif value is not None:
            print(f"  {name:<24}{value:,.0f}" if isinstance(value, int) else f"  {name:<24}{value:.4f}")
