"""`trimtab checkpoint export | import`: the command line of the Hugging Face format."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.context import EXIT_FAILED, EXIT_OK
from launch.arguments import add_json
from launch.config import ConfigError
from launch.output import print_json


def add_hf_actions(actions: Any) -> None:
    """Adds both actions to the `checkpoint` command."""
    export = actions.add_parser(
        "export",
        help="write a folder that transformers, vLLM and SGLang load",
        description="Writes a run's checkpoint in the Hugging Face format of DeepSeek-V3 (sigmoid scores) or V2.",
        epilog="example: trimtab checkpoint export runs/debug --format hf --out exported/debug --dtype bf16",
    )
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("--format", choices=("hf",), default="hf", help="hf is the only one")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the run's precision)")
    export.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    export.add_argument("--shard-gb", type=float, default=5.0, help="largest file of weights, 10^9 bytes (default: 5)")
    export.add_argument(
        "--with-optimizer", action="store_true",
        help="keep what training needs in DIR/trimtab, so that an import goes on as if nothing had happened",
    )  # fmt: skip
    export.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json, if the data is gone or has another"
    )
    export.add_argument(
        "--without-prediction-layers", action="store_true",
        help="leave out the multi-token prediction layers, for readers that do not know them",
    )  # fmt: skip
    export.set_defaults(run_command=_export)

    bring = actions.add_parser(
        "import",
        help="make a run out of a DeepSeek-V3 or V2 folder",
        description="Reads a Hugging Face folder (one tensor an expert or stacked; fp32, bf16, fp16, or fp8 in blocks) "
        "into a new run, which `trimtab train RUN/config.toml --run RUN --resume must` trains on.",
        epilog="example: trimtab checkpoint import DeepSeek-V2-Lite --out runs/v2 --config v2-lite",
    )
    bring.add_argument("folder", type=Path, help="the folder with config.json")
    bring.add_argument("assignments", nargs="*", default=[], metavar="key.path=value", help="override single keys")
    bring.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run to make; must not exist")
    bring.add_argument(
        "--config",
        default="",
        help="preset or TOML file for everything but the model (default: the exported run's)",
    )
    bring.add_argument("--weights-only", action="store_true", help="leave the optimizer's state behind")
    bring.add_argument(
        "--ignore-auto-map", action="store_true", help="read a folder that brings code; the code is not run"
    )
    bring.add_argument(
        "--other-tokenizer",
        action="store_true",
        help="leave the folder's tokenizer behind and train the model on the ids of the data's",
    )
    bring.add_argument("--shard-gb", type=float, default=4.0, help="largest file of the checkpoint (default: 4)")
    bring.set_defaults(run_command=_import)
    for action in (export, bring):
        add_json(action)


def _export(options: Any) -> int:
    from launch.hf_export import ExportOptions, export

    asked = ExportOptions(
        options.dtype, options.step, options.shard_gb, options.with_optimizer, options.tokenizer,
        not options.without_prediction_layers,
    )  # fmt: skip
    return _run(options, "export", lambda: export(options.run, options.out, asked, _progress("export")), _exported)


def _import(options: Any) -> int:
    from launch.hf_import import ImportOptions, import_folder

    asked = ImportOptions(
        options.config, tuple(options.assignments), options.weights_only, options.ignore_auto_map, options.shard_gb,
        options.other_tokenizer,
    )  # fmt: skip
    return _run(
        options, "import", lambda: import_folder(options.folder, options.out, asked, _progress("import")), _imported
    )


def _run(
    options: Any, what: str, call: Callable[[], dict[str, Any]], lines: Callable[[dict[str, Any]], list[str]]
) -> int:
    """Calls, prints the result; a full disk or a damaged checkpoint is a failure and not bad input."""
    from parallel.checkpoint import CheckpointError

    try:
        told = call()
    except ConfigError:
        raise
    except (CheckpointError, OSError) as error:
        print(f"{what} failed: {error}")
        if options.json:
            print_json({"error": str(error)})
        return EXIT_FAILED
    for line in lines(told):
        print(line)
    if options.json:
        print_json(told)
    return EXIT_OK


def _exported(told: dict[str, Any]) -> list[str]:
    kept = ", with the optimizer's state" if told["optimizer"] else ""
    return [
        f"exported step {told['step']} to {told['folder']}: {told['tensors']:,} tensors in {told['dtype']}, "
        f"{told['bytes'] / 1e6:,.1f} MB in {told['files']} file(s){kept}",
        *(f"note: {note}" for note in told["notes"]),
    ]


def _imported(told: dict[str, Any]) -> list[str]:
    state = "with the optimizer's state" if told["optimizer"] else "weights only: AdamW starts afresh"
    run = told["run"]
    return [
        *(f"note: {note}" for note in told["notes"]),
        f"imported {told['parameters']:,} parameters into {run}, step {told['step']} ({state})",
        f"train on with: trimtab train {run}/config.toml --run {run} --resume must",
    ]


def _progress(what: str) -> Callable[[int, int], None]:
    """Prints how far it is, at most every five seconds."""
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            print(f"{what}: {done / 2**30:,.1f} of {total / 2**30:,.1f} GiB", flush=True)
            last = time.monotonic()

    return say
