"""`trimtab generate`: completes prompts with a run's newest checkpoint."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.context import EXIT_OK
from launch.arguments import add_json, add_refused
from launch.config import ConfigError
from launch.output import print_json

QUANTIZED: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}


def add_generate_command(commands: Any) -> None:
    """Adds the `generate` command to a parser's subcommands."""
    generate = commands.add_parser(
        "generate",
        help="Complete a text with a run's checkpoint.",
        description="Completes one text or several with a run's newest checkpoint, or that of one step. Of one prompt "
        "the text appears as it comes; of several, each in its turn.",
        epilog="example: trimtab generate runs/debug --prompt 'def ' --top-p 0.9 --stop 'class ' --speculative mtp",
    )
    generate.add_argument("run", type=Path, help="the run's folder")
    generate.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="a text to complete; repeatable")
    generate.add_argument(
        "--prompts-file", type=Path, metavar="FILE",
        help='more prompts: a line each, or in a .jsonl file an object with "prompt" a line',
    )  # fmt: skip
    generate.add_argument("--max-new-tokens", type=int, default=128, help="for each prompt (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="draw among so many tokens only (default: 0, all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this sum only (default: 1, all)"
    )
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    generate.add_argument("--seed", type=int, default=0, help="of the draws; prompt i draws with SEED + i (default: 0)")
    generate.add_argument("--batch", type=int, default=8, help="prompts at a time (default: 8)")
    generate.add_argument(
        "--context", type=int, metavar="N",
        help="tokens looked at (default: the run's data.seq_len); a longer text goes on from its last half",
    )  # fmt: skip
    generate.add_argument(
        "--speculative", metavar="mtp|RUN",
        help="draft with the run's own prediction modules, or a smaller run; the text's distribution stays the same",
    )  # fmt: skip
    generate.add_argument("--draft-tokens", type=int, default=4, help="drafts a step of a second run (default: 4)")
    generate.add_argument("--quantize", choices=tuple(QUANTIZED), help="round the weights to 8 or 4 bits first")
    generate.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json, if the data is gone or has another"
    )
    add_json(generate)
    generate.set_defaults(run_command=run, joins_refused=True)


def run(options: argparse.Namespace) -> int:
    """Checks everything, then loads and completes."""
    prompts = checked_prompts(options)
    import torch

    from launch.allocator import keep_freed_memory
    from launch.completions import complete, make_drafter
    from launch.load import load_run
    from model.quantize import quantize
    from model.sampling import Sampling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    loaded = load_run(options.run, device, options.step, tokenizer=options.tokenizer)
    longest = loaded.config.model.max_position_embeddings
    if options.context is not None and options.context > longest:
        raise ConfigError(
            [f"--context {options.context} exceeds model.max_position_embeddings = {longest} of the run; "
             f"use at most {longest}"]
        )  # fmt: skip
    drafter = make_drafter(loaded, options.speculative, options.draft_tokens, device)
    size = quantize(loaded.model, QUANTIZED[options.quantize]) if options.quantize else None
    printer = Printer(prompts)
    made = complete(
        loaded, prompts, Sampling(options.temperature, options.top_k, options.top_p),
        max_new_tokens=options.max_new_tokens, seed=options.seed, stops=options.stop, batch=options.batch,
        context=options.context, begin=loaded.begin, drafter=drafter, show=printer.show,
    )  # fmt: skip
    printer.finish()
    if made.counts.acceptance is not None:
        print(
            f"trimtab: {made.counts.accepted} of {made.counts.drafted} drafts kept ({made.counts.acceptance:.0%}), "
            f"{made.counts.tokens} tokens in {made.counts.steps} forwards",
            file=sys.stderr,
        )
    if options.json:
        weights = None if size is None else {"bytes_before": size.before, "bytes_after": size.after}
        print_json({
            "run": str(options.run), "step": loaded.saved.step, **made.figures(), "quantized": options.quantize,
            "weights": weights, "speculative": options.speculative,
        })  # fmt: skip
    return EXIT_OK


class Printer:
    """Writes texts to standard output in the prompts' order: the first one as it comes, the others behind it."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._pieces = list(prompts)
        self._write(0)

    def show(self, number: int, text: str) -> None:
        """A piece of one text."""
        self._pieces[number] += text
        if number == 0:
            self._write(0)

    def finish(self) -> None:
        """Writes what is left and ends each text's line."""
        for number in range(len(self._pieces)):
            self._write(number)
            sys.stdout.write("\n")
        sys.stdout.flush()

    def _write(self, number: int) -> None:
        sys.stdout.write(self._pieces[number])
        sys.stdout.flush()
        self._pieces[number] = ""


def checked_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of a command line; one empty prompt where it names none.

    Raises:
        ConfigError: everything that is wrong with the options, at once.
    """
    from model.sampling import Sampling

    found = []
    if not (options.run / "config.toml").is_file():
        found.append(f"{options.run} is not a run: it has no config.toml; give the folder of a run, such as runs/debug")
    found += [f"--{text.replace('_', '-', 1)}" for text in
              Sampling(options.temperature, options.top_k, options.top_p).problems()]  # fmt: skip
    for name in ("max_new_tokens", "batch", "draft_tokens", "context"):
        value = getattr(options, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} {value} must be at least 1")
    if any(not stop for stop in options.stop):
        found.append("--stop '' would end every text at once; give a text, or leave it out")
    second = options.speculative
    if second not in (None, "mtp") and not (Path(second) / "config.toml").is_file():
        found.append(f"--speculative {second} is neither mtp nor a run's folder; use mtp, or a run with this tokenizer")
    prompts = list(options.prompt or [])
    if options.prompts_file is not None:
        prompts += _prompts_of(options.prompts_file, found)
    add_refused(found, options)
    if found:
        raise ConfigError(found)
    return prompts or [""]


def _prompts_of(path: Path, found: list[str]) -> list[str]:
    """The prompts of a file; what is wrong is added to `found`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found.append(f"--prompts-file {path}: cannot be read ({error}); give a UTF-8 text or .jsonl file")
        return []
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line]
    else:
        prompts = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("prompt"), str):
                prompts.append(record["prompt"])
            else:
                found.append(f'--prompts-file {path}, line {number}: is no JSON object with a text as "prompt"')
    if not prompts and not found:
        found.append(f"--prompts-file {path} holds no prompt; write one a line")
    return prompts
