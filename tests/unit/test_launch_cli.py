"""The command line of all commands: help, options out of range, `--json`, completion, the reference of keys."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import arguments
from launch.cli import build_parser, main
from launch.completion import SCRIPTS, candidates
from launch.key_reference import commented, explained, keys, page
from launch.output import only_json, print_json
from launch.submit import JobLog

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = list(arguments.commands(build_parser()))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.prog)
def test_help_is_complete(command: argparse.ArgumentParser) -> None:
    assert command.description and command.epilog and "example: " in command.epilog and "trimtab" in command.epilog
    for action in command._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, f"{command.prog}: {action.dest} has no help"
    named = {name for action in command._actions for name in action.option_strings}
    if command.prog == "trimtab generate" or "checkpoint export" in command.prog or command.prog == "trimtab eval":
        assert "--step" in named


def test_the_examples_of_help_are_understood() -> None:
    import shlex

    for command in COMMANDS:
        words = shlex.split((command.epilog or "").partition("trimtab ")[2])
        if "completion" not in command.prog:
            _, rest = build_parser().parse_known_args(words)
            assert all("=" in word for word in rest), command.epilog


@pytest.mark.parametrize("words", [[], ["data"], ["checkpoint"], ["bench"]])
def test_without_a_command_the_help_is_shown(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: " + " ".join(["trimtab", *words]))


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and re.fullmatch(r"trimtab \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "x", "--temprature", "3"], ["usage: trimtab generate", "did you mean --temperature?"]),
        (["train", "debug", "--lr", "1e-3"], ["usage: trimtab train", "written as optimizer.lr=VALUE"]),
        (["data", "verify", "x", "--deep"], ["usage: trimtab data verify", "unrecognized arguments: --deep"]),
        (["bench", "moe", "stray"], ["usage: trimtab bench moe", "unrecognized arguments: stray"]),
    ],
)
def test_unknown_words_show_the_usage_of_their_command(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and all(phrase in said for phrase in expected)


def numeric_options() -> list[tuple[argparse.ArgumentParser, argparse.Action]]:
    return [(one, action) for one in COMMANDS for action in one._actions if arguments.legal(one, action)]


@pytest.mark.parametrize(
    ("command", "action"), numeric_options(), ids=lambda one: getattr(one, "prog", getattr(one, "dest", ""))
)
def test_every_number_of_every_command_is_refused_out_of_range(
    command: argparse.ArgumentParser, action: argparse.Action, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    needed = []
    for other in command._actions:
        if other.required and other is not action and other.help != argparse.SUPPRESS:
            needed += [*other.option_strings[-1:], str(tmp_path / "nowhere")]
    wrong = ["-1", "9" * 30] if action.type is int else ["nan", "-1"]
    for value in wrong:
        name = action.option_strings[-1]
        assert main([*command.prog.split()[1:], *needed, f"{name}={value}"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and name in said.err and "Traceback" not in said.err
    if action.default is not None:
        known = arguments.bounds.wrong("", action.default, arguments.legal(command, action))
        assert known is None or action.default == 0


def test_json_is_alone_on_standard_output() -> None:
    program = (
        "import subprocess, sys\n"
        "from launch.output import only_json, print_json\n"
        "with only_json():\n"
        "    print('for people')\n"
        "    subprocess.run([sys.executable, '-c', 'print(1)'])\n"
        "    print_json({'loss': float('nan'), 'rows': (1, 2)})\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"loss": null, "rows": [1, 2]}\nafter\n'
    assert "for people\n" in done.stderr and "1\n" in done.stderr


def test_json_in_one_process(capsys: pytest.CaptureFixture) -> None:
    with only_json():
        print("for people")
        print_json({"a": 1})
    said = capsys.readouterr()
    assert (said.out, said.err) == ('{"a": 1}\n', "for people\n")


def test_every_command_with_json_writes_it_by_the_same_function() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        assert "print(json.dumps" not in path.read_text(encoding="utf-8"), f"{path.name}: use print_json"


def test_the_object_of_a_job_is_taken_out_of_its_log(capsys: pytest.CaptureFixture) -> None:
    log = JobLog()
    log.show('start\n{"exit_status": 0, "steps": 6}\n')
    log.show("end\n")
    assert log.figures == {"exit_status": 0, "steps": 6} and capsys.readouterr().out == "start\nend\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["data", ""], ["audit", "pack", "verify"]),
        (["train", "la"], ["laptop"]),
        (["train", "debug", "train.st"], ["train.steps="]),
        (["train", "debug", "--launcher", ""], ["debug", "local", "mpi", "ray"]),
        (["generate", "--top"], ["--top-k", "--top-p"]),
        (["train", "debug", "--run", ""], []),
    ],
)
def test_completion(words: list[str], expected: list[str]) -> None:
    assert candidates(build_parser(), words) == expected


def test_completion_in_bash(tmp_path: Path) -> None:
    command = tmp_path / "trimtab"
    command.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} trimtab.py "$@"\n')
    command.chmod(0o755)
    program = f"""PATH={tmp_path}:$PATH
{SCRIPTS["bash"]}
COMP_WORDS=(trimtab train debug optimizer.warm); COMP_CWORD=3
_trimtab 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "optimizer.warmup_steps=\n", done.stderr


def test_every_key_is_explained() -> None:
    assert len(keys()) > 130
    for key in keys().values():
        assert len(key.meaning) > 8, f"{key.dotted} is not explained in its section's docstring"
    assert "The highest learning rate" in explained("optimizer.lr") and explained("nothing") == ""
    assert explained("balance").count("Legal: ") > 15


def test_the_page_of_keys_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "write it again: .venv/bin/trimtab config --markdown > docs/configuration.md"


def test_a_printed_configuration_explains_and_reads_back() -> None:
    import tomllib

    from launch.config import Config, dump

    text = commented(dump(Config()))
    assert tomllib.loads(text) == tomllib.loads(dump(Config()))
    assert "# optimizer steps in all (an integer, from 1 to 1,000,000,000)\nsteps = 200\n" in text
    assert json.dumps(text)


def test_only_what_is_needed_is_called_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: CONFIG")
