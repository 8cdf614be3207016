"""The command line: reads arguments, hands over to one function a command, turns errors into exit statuses.

Exit status: 0 done; 2 bad input (nothing started); 75 stopped on request with a committed checkpoint; 1 anything else.
"""

import argparse
import difflib
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from cluster.context import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from cluster.flag import StopFlag
from cluster.process import about_to_end
from cluster.redact import guard_output, restore_output
from data.errors import DataError
from launch.arguments import add_json, problems, unknown
from launch.arguments import commands as every_command
from launch.config import LAUNCHERS, Config, ConfigError, dump, preset_names
from launch.lasting import open_missing_streams, outliving_readers
from launch.output import only_json, print_json

ROOT = Path(__file__).resolve().parent.parent


def program() -> int:
    """The command line of this process, which ends with it; returns its exit status."""
    open_missing_streams()
    try:
        return main(sys.argv[1:])
    finally:
        about_to_end()


def main(arguments: list[str]) -> int:
    """Runs one command; returns the process's exit status."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may also stand after options: argparse takes a positional list in one piece only.
    assignments = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(assignments) < len(rest) or (rest and not hasattr(options, "assignments")):
        options.parser.error(unknown([word for word in rest if word not in assignments] or rest, options.parser))
    if rest:
        options.assignments = [*options.assignments, *assignments]
    with only_json() if getattr(options, "json", False) else nullcontext():
        guard_output()
        try:
            options.refused = problems(options)
            if options.refused and not getattr(options, "joins_refused", False):
                raise ConfigError(options.refused)
            return options.run_command(options)
        except (ConfigError, DataError) as error:
            print(f"trimtab: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("trimtab: interrupted", file=sys.stderr)
            return EXIT_FAILED
        except BrokenPipeError:
            return EXIT_FAILED
        finally:
            with suppress(BrokenPipeError):
                restore_output()


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options and an example; a command without its subcommand prints its help."""
    parser = argparse.ArgumentParser(
        prog="trimtab",
        description="Train DeepSeek-V3-shaped mixture-of-experts language models across nodes.",
        epilog="example: trimtab train debug train.steps=50 --launcher local",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], help_text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_text, description=help_text, epilog=f"example: trimtab {example}")
        made.set_defaults(run_command=run)
        return made

    train = command("train", _train, "Train a model.", "train debug train.steps=50 --launcher local --run runs/try")
    _run_options(train)
    train.add_argument("--launcher", choices=LAUNCHERS, default="local", help="who starts the ranks (default: local)")
    train.add_argument(
        "--print-config", action="store_true",
        help="print the resolved configuration as TOML, each key with its meaning, and stop",
    )  # fmt: skip

    submit = command(
        "submit", _submit, "Train through `ray job submit`, following the log.",
        "submit debug --address http://127.0.0.1:8265",
    )  # fmt: skip
    _run_options(submit)
    submit.add_argument(
        "--address",
        help="dashboard of a running Ray cluster; without it a local one is started, and stopped at the end",
    )
    submit.add_argument(
        "--no-wait", action="store_true", help="with --address: do not follow the job, `trimtab jobs` does later"
    )

    config = command("config", _config, "Explain keys of the configuration.", "config optimizer.lr")
    config.add_argument("keys", nargs="*", metavar="KEY", help="a key or a section (default: all of them)")
    config.add_argument("--markdown", action="store_true", help="print the page docs/configuration.md instead")

    report = command("report", _report, "Render a run's report.md from its files.", "report runs/debug")
    report.add_argument("run", type=Path, help="the run's folder")
    add_json(report, "the run's figures as one JSON object")

    compare = command(
        "compare", _compare, "Put the figures of several runs side by side.", "compare runs/debug runs/debug-no-bias"
    )
    compare.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw their curves over each other into a PNG")
    add_json(compare)

    from launch.bench_commands import add_bench_commands
    from launch.checkpoint_commands import add_checkpoint_commands
    from launch.completion import add_completion_command
    from launch.data_commands import add_data_commands
    from launch.eval_commands import add_eval_command
    from launch.generate_commands import add_generate_command
    from launch.jobs_command import add_jobs_command
    from launch.runs_command import add_runs_command

    add_jobs_command(command)
    add_runs_command(commands)
    add_generate_command(commands)
    add_eval_command(commands)
    add_checkpoint_commands(commands)
    add_data_commands(commands)
    add_bench_commands(commands)
    add_completion_command(commands)
    for one in every_command(parser):
        one.set_defaults(parser=one)
        if not one.get_default("run_command"):
            one.set_defaults(run_command=_help)
    return parser


def version() -> str:
    """This version, as pyproject.toml has it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def _help(options: Any) -> int:
    options.parser.print_help()
    return EXIT_OK


def _config(options: Any) -> int:
    from launch.key_reference import explained, keys, page

    if options.markdown:
        print(page(), end="")
        return EXIT_OK
    found = {name: explained(name) for name in options.keys or dict.fromkeys(key.split(".")[0] for key in keys())}
    known = [*keys(), *Config.__dataclass_fields__]
    missing = []
    for name in (name for name, text in found.items() if not text):
        near = difflib.get_close_matches(name, known, n=1)
        missing.append(
            f"{name} is not a known key; " + (f"did you mean `{near[0]}`?" if near else "see `trimtab config`")
        )
    if missing:
        raise ConfigError(missing)
    print("\n".join(found.values()), end="")
    return EXIT_OK


def _run_options(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(preset_names())
    parser.add_argument("config", metavar="CONFIG", help=f"a preset ({presets}) or a TOML file")
    parser.add_argument(
        "assignments",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="change single keys; `trimtab config` explains them",
    )
    parser.add_argument("--run", help="the run's folder (default: runs/NAME of CONFIG)")
    parser.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto",
        help="go on from the run's newest checkpoint where there is one (auto), or refuse if there is none (must) or "
        "one (never) (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-change", action="append", default=[], metavar="KEY", help="resume although this key has changed"
    )
    parser.add_argument(
        "--insecure", action="store_true",
        help="use a Ray cluster without token authentication, or with a dashboard that is not on loopback",
    )  # fmt: skip
    parser.add_argument("--no-summary", action="store_true", help="do not evaluate and summarise at the end")
    add_json(parser, "the run's figures as one JSON object at the end")


@outliving_readers()
def _train(options: Any) -> int:
    began = time.monotonic()
    if options.print_config:
        return _print_config(options)
    if options.launcher != "mpi":
        return _train_plan(options, _checked(options, None), began)
    from cluster import mpi
    from cluster.mpi_exchange import RefusedTogether, all_or_none
    from cluster.signals import StopSignals

    try:
        with all_or_none():
            world = mpi.mpi_world()
            # From here on a request to stop is kept for the first step: SIGUSR1 would kill a rank that packs or starts.
            with StopSignals(extra=(signal.SIGUSR1,)) as signals:
                return _train_plan(options, _checked_together(options, world), began, signals.stop)
    except mpi.MpiError as error:
        raise ConfigError([str(error)]) from error
    except RefusedTogether as refused:
        if refused.speaks:
            print(f"trimtab: {ConfigError(refused.problems)}", file=sys.stderr, flush=True)
        return refused.exit_code


def _checked(options: Any, mpi_size: int | None) -> Any:
    from launch import preflight

    return preflight.check(
        options.config, options.assignments, run=options.run, launcher=options.launcher, resume=options.resume,
        accepted=options.accept_change, mpi_size=mpi_size, insecure=options.insecure,
    )  # fmt: skip


def _checked_together(options: Any, world: Any) -> Any:
    """The plan that every rank of mpirun has found for itself.

    Raises:
        RefusedTogether: on every rank, where any of them refuses the run, or where they do not see the same run.
    """
    from cluster.mpi_exchange import refuse_together, unlike

    plan: Any = None
    problems: list[str] = []
    try:
        plan = _checked(options, world.Get_size())
    except ConfigError as error:
        problems = error.problems
    except (DataError, OSError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    refuse_together(world, problems)
    seen = {"the configuration": dump(plan.config), "the run's folder": str(plan.run), "a finished run": str(plan.done)}
    refuse_together(world, unlike(world, seen))
    return plan


def _train_plan(options: Any, plan: Any, began: float, stop: StopFlag | None = None) -> int:
    from launch.start import is_first, report_end, say, start

    if plan.done:
        return _already_done(plan, say, options.json) if is_first(plan.launcher) else EXIT_OK
    result = start(plan, cause=f"trimtab train {options.config}", began=began, stop=stop)
    if not is_first(plan.launcher):
        return result.exit_code
    status = report_end(plan, result)
    if status == EXIT_OK and not options.no_summary:
        status = EXIT_OK if _summarize(plan, say) else EXIT_FAILED
    if options.json:
        from launch.summary import figures_of

        print_json({"exit_status": status, **figures_of(plan.run)})
    return status


def _print_config(options: Any) -> int:
    """Prints the configuration as the launcher will run it; refuses what `train` refuses about it.

    Data that is not there and a folder that is taken are for `train` to refuse: the configuration of a large run is
    written and read on small machines.
    """
    from launch.preflight import checked_config

    found: list[str] = []
    config, _, _ = checked_config(options.config, options.assignments, options.launcher, found, [], None)
    if found:
        raise ConfigError(found)
    from launch.key_reference import commented

    print(commented(dump(config)), end="")
    return EXIT_OK


def _already_done(plan: Any, say: Callable[[str], None], as_json: bool) -> int:
    """Says what a complete run is, without training or evaluating again."""
    from launch.summary import show_summary

    for note in plan.notes:
        say(note)
    figures = show_summary(plan.run, say)
    if as_json:
        print_json({"exit_status": EXIT_OK, **figures})
    return EXIT_OK


SUMMARY_LIMIT = 200_000_000  # parameters: above this one process should not load the model unasked


def _summarize(plan: Any, say: Callable[[str], None]) -> bool:
    """Says how the run went; whether that worked."""
    from model.count import count_parameters

    total = count_parameters(plan.config.model).total
    if total > SUMMARY_LIMIT:
        from launch.report import write_report

        say(f"report: {write_report(plan.run)} (no evaluation in one process: the model has {total:,} parameters)")
        return True
    if plan.launcher == "ray":
        from launch.summary_process import summarize_apart

        return summarize_apart(plan.run, say)
    from launch.summary import summarize_run

    summarize_run(plan.run, say)
    return True


def _submit(options: Any) -> int:
    from launch.submit import submit

    return submit(options)


def _report(options: Any) -> int:
    from launch.report import summarize, write_report

    _require_run(options.run)
    if options.json:
        print_json(summarize(options.run))
    else:
        print(write_report(options.run))
    return EXIT_OK


def _compare(options: Any) -> int:
    from launch.compare import compare

    for run in options.runs:
        _require_run(run)
    table, figures = compare(options.runs)
    print(table)
    if options.plot is not None:
        from launch.compare_plot import save_curves

        save_curves(options.plot, options.runs)
        print(f"curves: {options.plot}")
    if options.json:
        print_json(figures)
    return EXIT_OK


def _require_run(path: Path) -> None:
    if not (path / "config.toml").is_file():
        raise ConfigError([f"{path} is not a run: it has no config.toml; give the folder of a run, such as runs/debug"])
