"""The commands that README.md and docs/ print are understood, and what they configure is accepted."""

import re
from pathlib import Path

import pytest

from launch.arguments import commands
from launch.cli import build_parser
from launch.config import ConfigError
from launch.preflight import checked_config
from tests.end_to_end.docs_commands import ROOT, Printed, printed, without_placeholders

COMMANDS = list(printed())
CONFIGURED = [one for one in COMMANDS if one.block and one.trimtab[:1] in (("train",), ("submit",))]
MPIRUN_SCRIPT = [one for one in COMMANDS if one.words and one.words[0] == "launch/jobs/mpirun.sh"]
CLUSTER_SCRIPT = [one for one in COMMANDS if one.words[:2] == ("launch/jobs/ray_cluster.sh", "submit")]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 60 and len(CONFIGURED) > 10 and MPIRUN_SCRIPT and CLUSTER_SCRIPT


def test_every_trimtab_command_is_understood() -> None:
    for one in COMMANDS:
        if one.trimtab:
            words = without_placeholders(one.trimtab)
            if not one.block:  # a mention, which may leave out what the command needs
                assert_names_exist(one, words)
                continue
            try:
                _, rest = build_parser().parse_known_args(words)
            except SystemExit as end:
                assert end.code == 0, str(one)
                continue
            assert all("=" in word and not word.startswith("-") for word in rest), f"{one}\nnot understood: {rest}"


def assert_names_exist(one: Printed, words: list[str]) -> None:
    """The command and its options are known."""
    of = {command.prog: command for command in commands(build_parser())}
    name = max((prog for prog in of if f"trimtab {' '.join(words)} ".startswith(f"{prog} ")), key=len)
    assert name != "trimtab" or words[0].startswith("-"), f"{one}\nthere is no such command"
    known = {option for action in of[name]._actions for option in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= known, str(one)


def problems_of(words: list[str], launcher: str, mpi_size: int | None = None) -> list[str]:
    found: list[str] = []
    try:
        checked_config(words[0], words[1:], launcher, found, [], mpi_size)  # type: ignore[arg-type]
    except ConfigError as error:
        found += error.problems
    return found


@pytest.mark.parametrize("one", CONFIGURED, ids=str)
def test_what_is_printed_may_start(one: Printed) -> None:
    options, rest = build_parser().parse_known_args(without_placeholders(one.trimtab))
    launcher = "ray" if one.trimtab[0] == "submit" else options.launcher
    size = next((int(number) for flag, number in zip(one.words, one.words[1:], strict=False) if flag == "-n"), None)
    words = [options.config, *options.assignments, *rest]
    if Path(words[0]).suffix == ".toml":
        words[0] = "debug"  # of a run or the reader's own
    found = problems_of([word.replace("$p", "load") for word in words], launcher, size)
    if sample := said_by_the_page(one):
        assert found == sample
    else:
        assert not found, f"{one}\n" + "\n".join(found)


@pytest.mark.parametrize("one", MPIRUN_SCRIPT + CLUSTER_SCRIPT, ids=str)
def test_what_scripts_are_given_may_start(one: Printed) -> None:
    size = int(one.words[1]) if one in MPIRUN_SCRIPT else None
    words = [word for word in one.words[2:] if word == "debug" or "=" in word]
    assert not problems_of(words, "mpi" if size else "ray", size)


def said_by_the_page(one: Printed) -> list[str]:
    """The problems that the page prints below a command."""
    lines = (ROOT / one.page).read_text(encoding="utf-8").splitlines()[one.line :]
    if not lines or not re.search(r"trimtab: .* problems? ", lines[0]):
        return []
    found: list[str] = []
    for line in lines[1:]:
        if not line.startswith("      "):
            break
        found.append(line.strip().removeprefix("- "))
    return found


def test_a_command_that_changes_keys_names_its_run() -> None:
    """After `make train` the run runs/debug is complete: a command that goes there trains nothing."""
    for one in CONFIGURED:
        changes = [word for word in one.trimtab if "=" in word and not word.startswith("-")]
        runs = [word for word in one.trimtab if word == "--run"]
        refused = said_by_the_page(one)
        assert not changes or runs or refused, f"{one}\ngive it --run, so that it trains"


def test_scripts_that_are_printed_exist() -> None:
    for one in COMMANDS:
        for word in one.words:
            if word.startswith("launch/jobs/"):
                assert (ROOT / word).is_file(), str(one)


def test_samples_of_output_are_not_cut_in_a_word() -> None:
    for page in ("README.md",):
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            if line.startswith("    ") and len(line) >= 116 and ": " in line:
                assert line.rstrip()[-1] in ".)…\\`'\"%:" or line.rstrip().endswith("ranks"), line
