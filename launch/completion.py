"""`trimtab completion SHELL`: completion of commands, options, presets and keys in bash, zsh and fish.

The shell asks `trimtab completion words` at each Tab, so that what it offers is what this version knows.
"""

import argparse
from pathlib import Path
from typing import Any

from cluster.context import EXIT_OK
from launch.config import Config, preset_names
from launch.schema import places

_BASH = """_trimtab() {
    local found
    found="$(trimtab completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)"
    COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
    [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _trimtab trimtab
"""
SCRIPTS = {
    "bash": "# ~/.bashrc: source <(trimtab completion bash)\n" + _BASH,
    "zsh": "# ~/.zshrc: source <(trimtab completion zsh)\nautoload -U +X bashcompinit && bashcompinit\n" + _BASH,
    "fish": """# ~/.config/fish/config.fish: trimtab completion fish | source
complete -c trimtab -a '(trimtab completion words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}


def add_completion_command(commands: Any) -> None:
    """Adds the `completion` command to a parser's subcommands."""
    completion = commands.add_parser(
        "completion",
        help="Print a shell's completion script.",
        description="Prints a script that completes commands, options, presets and configuration keys.",
        epilog="example: source <(trimtab completion bash)",
    )
    completion.add_argument("shell", choices=(*SCRIPTS, "words"), help="words: what fits the words after --")
    completion.add_argument("words", nargs="*", default=[], help="the command line so far, without `trimtab`")
    completion.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    if options.shell != "words":
        print(SCRIPTS[options.shell], end="")
        return EXIT_OK
    from launch.cli import build_parser

    for word in candidates(build_parser(), options.words):
        print(word)
    return EXIT_OK


def candidates(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """What may stand in the place of the last word.

    Args:
        words: the command line behind `trimtab`, the last one perhaps begun or empty.
    """
    *before, last = words or [""]
    positional = 0
    for word in before:
        choices = _subcommands(parser)
        if word in choices:
            parser, positional = choices[word], 0
        elif not word.startswith("-"):
            positional += 1
    asked = _option(parser, before[-1]) if before else None
    if asked is not None and asked.nargs != 0:
        return _starting(last, [str(choice) for choice in asked.choices or ()])
    if last.startswith("-"):
        return _starting(last, [name for action in parser._actions for name in action.option_strings])
    found = list(_subcommands(parser))
    takes = {action.dest for action in parser._actions if not action.option_strings}
    if "config" in takes and positional == 0:
        found += preset_names()
    elif "assignments" in takes:
        found += [f"{key}=" for keys in places(Config).values() for key in keys]
    elif takes & {"run", "runs"}:
        found += [str(path.parent) for path in sorted(Path("runs").glob("*/config.toml"))]
    return _starting(last, found)


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _option(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    return next((action for action in parser._actions if name in action.option_strings), None)


def _starting(begun: str, words: list[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(begun)})
