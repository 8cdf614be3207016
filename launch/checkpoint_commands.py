"""`trimtab checkpoint list | verify | prune`; `export` and `import` are in hf_commands.py."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from launch.arguments import add_json
from launch.config import Config, ConfigError, read
from launch.output import print_json
from launch.runfolder import RunFolder


def add_checkpoint_commands(commands: Any) -> None:
    """Adds the `checkpoint` command and its actions to a parser's subcommands."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="List, check, delete, export and import checkpoints.",
        description="Lists, checks, deletes, exports and imports checkpoints.",
        epilog="example: trimtab checkpoint verify runs/debug",
    )
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION")

    listing = actions.add_parser(
        "list",
        help="show step, size and layout of each",
        description="Shows step, size and layout of each checkpoint of a run.",
        epilog="example: trimtab checkpoint list runs/debug",
    )
    listing.set_defaults(run_command=_list)

    verify = actions.add_parser(
        "verify",
        help="read every byte back",
        description="Reads every checkpoint of a run back and names each damaged file.",
        epilog="example: trimtab checkpoint verify runs/debug",
    )
    verify.set_defaults(run_command=_verify)

    prune = actions.add_parser(
        "prune",
        help="delete those beyond the newest few, and what dead runs left half-written",
        description="Deletes checkpoints of a run that nobody trains now, by the run's own rule unless told another.",
        epilog="example: trimtab checkpoint prune runs/debug --keep 1 --dry-run",
    )
    prune.add_argument("--keep", type=int, help="so many of the newest stay, at least 1 (default: checkpoint.keep)")
    prune.add_argument(
        "--keep-every", type=int, metavar="STEPS",
        help="and every multiple of STEPS, 0 for none (default: checkpoint.keep_every_steps)",
    )  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.set_defaults(run_command=_prune)
    from launch.hf_commands import add_hf_actions

    add_hf_actions(actions)
    for action in (listing, verify, prune):
        action.add_argument("run", type=Path, help="the run's folder")
        add_json(action)


def _opened(folder: Path) -> tuple[Config, Any]:
    """A run's configuration and the folder of its checkpoints; raises ConfigError where it is not a run."""
    from launch.resume import checkpoint_root

    if not (folder / "config.toml").is_file():
        raise ConfigError(
            [f"{folder} is not a run: it has no config.toml; give the folder of a run, such as runs/debug"]
        )
    run = RunFolder(folder)
    problems: list[str] = []
    config = read(str(run.config), [], problems)
    if problems:
        raise ConfigError([f"{run.config}: {problem}" for problem in problems])
    return config, checkpoint_root(config, run)


def _list(options: Any) -> int:
    from parallel.checkpoint import CheckpointError, open_checkpoint
    from parallel.roots import drafts, readable, step_of

    _, root = _opened(options.run)
    found = []
    listed = _answered(lambda: readable(root), root)
    for path in listed:
        row: dict[str, Any] = {"step": step_of(path), "path": str(path)}
        try:
            manifest = open_checkpoint(path).manifest
            layout = manifest.get("layout", {})
            row |= {
                "bytes": sum(entry["size"] for entry in manifest["files"].values()),
                "tokens": manifest.get("tokens"), "world_size": layout.get("world_size"),
                "ep_size": layout.get("ep_size"), "files": len(manifest["files"]),
                "weights_only": bool(manifest.get("weights_only")),
                "saved": _time(path / "COMMIT"),
            }  # fmt: skip
        except (CheckpointError, OSError) as error:
            row["damaged"] = str(error)
        found.append(row)
    for row in found:
        if "damaged" in row:
            print(f"step {row['step']:>8}  NOT READABLE: {row['damaged']}")
        else:
            print(
                f"step {row['step']:>8}  {row['bytes'] / 2**20:10,.1f} MiB  {row['files']} files of "
                f"{row['world_size']} ranks (ep {row['ep_size']})  {row['tokens']:,} tokens  {row['saved']}"
                f"{'  weights only' if row['weights_only'] else ''}"
            )
    names = [path.name for path in _answered(lambda: drafts(root), root) if path not in listed]
    if names:
        print(f"not published: {', '.join(names)}; the next save or `trimtab checkpoint prune` deletes them")
    if not found:
        print(f"no committed checkpoint in {root}")
    if options.json:
        print_json({"checkpoints": found, "drafts": names})
    return EXIT_OK


def _verify(options: Any) -> int:
    from launch.load import committed_checkpoints
    from parallel.checkpoint import CheckpointError, damaged_files, open_checkpoint

    _opened(options.run)
    status, found = EXIT_OK, {}
    for path in committed_checkpoints(options.run):
        try:
            saved = open_checkpoint(path)
            wrong = damaged_files(saved)
        except CheckpointError as error:
            wrong = [str(error)]
        found[str(path)] = wrong
        for line in wrong:
            print(line)
            status = EXIT_FAILED
        if not wrong:
            files, tensors = len(saved.manifest["files"]), len(saved.manifest["tensors"])
            print(f"{path}: {files} files, {tensors} tensors, all as written")
    if options.json:
        print_json({"checkpoints": found})
    return status


def _prune(options: Any) -> int:
    """Never the newest readable one: a damaged newest checkpoint does not count towards those that are kept."""
    from launch.identity import standing
    from launch.lock import only_driver
    from parallel import retention, saving
    from parallel.roots import committed, drafts, step_of

    config, root = _opened(options.run)
    keep = config.checkpoint.keep if options.keep is None else options.keep
    every = config.checkpoint.keep_every_steps if options.keep_every is None else options.keep_every
    if every < 0 or keep < 0 or (options.keep is not None and keep < 1):
        raise ConfigError([f"--keep = {keep}, --keep-every = {every}: keep at least 1 checkpoint, and every 0 or more"])
    if problem := standing(options.run.absolute(), config).problem:
        raise ConfigError([problem])
    with only_driver(options.run):
        if not options.dry_run:
            retention.recover(root)
        readable = [path for path in committed(root) if not _damaged(path)]
        damaged = [path for path in committed(root) if path not in readable]
        kept = retention.kept_steps([step_of(path) for path in readable], keep, every)
        gone = [path for path in readable if step_of(path) not in kept]
        begun = [path for path in drafts(root) if not path.name.endswith(".old")]
        if not options.dry_run:
            retention.remove(gone)
            saving.remove_drafts(begun)
    for path in (*gone, *begun):
        print(f"{'would delete' if options.dry_run else 'deleted'} {path}")
    for path in damaged:
        print(f"left {path}: it is damaged, see `trimtab checkpoint verify`; delete it by hand")
    print(f"{len(readable) - len(gone)} readable checkpoints {'would stay' if options.dry_run else 'stay'} in {root}")
    if options.json:
        paths = {"deleted": gone, "drafts": begun, "damaged": damaged}
        print_json({name: [str(path) for path in listed] for name, listed in paths.items()})
    return EXIT_OK


def _answered(call: Callable[[], list[Any]], root: Any) -> list[Any]:
    try:
        return call()
    except OSError as error:
        raise ConfigError([f"the checkpoints in {root} cannot be listed: {error}"]) from error


def _time(path: Any) -> str:
    """When a file was written, UTC; empty where the storage does not say."""
    seconds = path.stat().st_mtime if isinstance(path, Path) else path.modified()
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _damaged(path: Any) -> bool:
    from parallel.checkpoint import CheckpointError, damaged_files, open_checkpoint

    try:
        return bool(damaged_files(open_checkpoint(path)))
    except CheckpointError:
        return True
