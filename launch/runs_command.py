"""`trimtab runs [DIR]`: every run under a folder."""

import argparse
from pathlib import Path
from typing import Any

from cluster.context import EXIT_OK
from launch.arguments import add_json
from launch.config import ConfigError
from launch.output import print_json
from launch.run_list import as_data, list_runs, table


def add_runs_command(commands: Any) -> None:
    """Adds the parser of `trimtab runs`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "runs",
        help="List every run under a folder.",
        description="List every run under a folder: how far it is, how it ended, its loss and held-out bits per byte.",
        epilog="example: trimtab runs runs",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    add_json(parser)
    parser.set_defaults(run_command=_runs)


def _runs(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise ConfigError([f"{options.folder} is not a folder; give one that holds runs, such as runs"])
    lines = list_runs(options.folder)
    if options.json:
        print_json({"folder": str(options.folder), "runs": as_data(lines)})
    elif lines:
        print(table(lines))
    else:
        print(f"there is no run under {options.folder}; trimtab train makes one")
    return EXIT_OK
