"""`trimtab data pack | verify | audit`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cluster.context import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from data.errors import DataError
from launch.arguments import add_json
from launch.config import refuse_secrets
from launch.output import print_json


def add_data_commands(commands: Any) -> None:
    """Adds the `data` command and its actions to a parser's subcommands."""
    data = commands.add_parser(
        "data", help="Pack, verify and audit data.", description="Packs, verifies and audits data.",
        epilog="example: trimtab data pack python --out datasets/python",
    )  # fmt: skip
    actions = data.add_subparsers(dest="action", metavar="ACTION")

    pack = actions.add_parser(
        "pack",
        help="make an indexed WebDataset of tokens",
        description="Makes an indexed WebDataset of tokens from folders, files of text or rows (JSON lines, JSON, "
        "Parquet; also compressed), addresses, or `python`. What is left out is named by reason.",
        epilog="example: trimtab data pack ~/notes --out datasets/notes --tokenizer bpe:8192",
    )
    pack.add_argument(
        "sources", nargs="*", default=[], metavar="SOURCE", help="a folder, a file, or the built-in corpus `python`"
    )
    pack.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH[@WEIGHT]", dest="weighted",
        help="instead of SOURCE, several times: a source of its own name and weight (default: 1) in training",
    )  # fmt: skip
    pack.add_argument("--out", required=True, type=Path, help="the dataset's folder")
    pack.add_argument(
        "--tokenizer", default="bpe:4096", help="bytes, bpe:N, deepseek or a tokenizer.json (default: bpe:4096)"
    )
    pack.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME",
        help="field or column of JSON and Parquet rows (default: text); SOURCE=NAME for one --source alone",
    )
    pack.add_argument("--allow-left-out", action="store_true", help="pack although more text is left out than taken")
    pack.add_argument(
        "--end-token", metavar="TEXT",
        help="the token of a tokenizer.json that ends a document (default: the eos_token of the "
        "tokenizer_config.json beside it, else a known name)",
    )  # fmt: skip
    pack.add_argument(
        "--allow-lossy", action="store_true", help="pack with a tokenizer that loses more than 1%% of the text"
    )
    pack.add_argument("--shard-mb", type=float, default=64, help="size of a shard in MiB (default: 64)")
    pack.add_argument("--heldout", type=float, default=0.02, help="share of documents held out (default: 0.02)")
    pack.add_argument("--licence", help="licence of documents whose source does not say it (an SPDX name)")
    pack.add_argument("--workers", type=int, default=1, help="processes that encode (default: 1)")
    pack.add_argument("--overwrite", action="store_true", help="replace a dataset packed from other inputs")
    add_json(pack)
    pack.set_defaults(run_command=_pack)

    verify = actions.add_parser(
        "verify",
        help="read every byte back",
        description="Reads every byte of a dataset back and names each damaged shard or sample.",
        epilog="example: trimtab data verify datasets/python",
    )
    verify.add_argument("path", help="the dataset's folder or address")
    add_json(verify)
    verify.set_defaults(run_command=_verify)

    audit = actions.add_parser(
        "audit",
        help="prove that no sequence was lost or repeated",
        description="Proves from a run's ledger that no sequence was lost or repeated, through every restart.",
        epilog="example: trimtab data audit runs/debug",
    )
    audit.add_argument("run", type=Path, help="the run's folder")
    audit.add_argument("--data", type=Path, help="the dataset's folder, if it has moved")
    add_json(audit)
    audit.set_defaults(run_command=_audit)


def progress_line(phase: str, done: int, total: int) -> None:
    """One line on standard error that is written over, on a terminal; a line per phase elsewhere."""
    if sys.stderr.isatty():
        share = f"{done / total:4.0%}" if total else f"{done:,}"
        sys.stderr.write(f"\r{phase:<28}{share}\033[K")
        sys.stderr.flush()
    elif done == 0 or (total and done >= total):
        sys.stderr.write(f"{phase}: {done:,}/{total:,}\n")


def _pack(options: argparse.Namespace) -> int:
    refuse_secrets({"SOURCE": options.sources, "--source": options.weighted, "--out": str(options.out)})
    encoding = _mpi_encoding()
    try:
        packed, figures = _packed(options, encoding)
    except BaseException as error:
        if encoding is not None:
            print(f"trimtab: {error}", file=sys.stderr, flush=True)
            encoding.abort(EXIT_BAD_INPUT if isinstance(error, DataError) else EXIT_FAILED)
        raise
    if encoding is not None and not encoding.writes:
        return EXIT_OK
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    print(packed)
    if options.json:
        print_json({"path": str(packed.path), "reused": packed.reused, "seconds": packed.seconds, **figures})
    return EXIT_OK


def _packed(options: argparse.Namespace, encoding: Any) -> tuple[Any, dict[str, Any]]:
    """What packing gave, and the figures of it for --json."""
    from dataclasses import asdict

    from data.pack import pack, pack_weighted
    from data.packing import Settings
    from data.weighted import WeightedSource

    progress = progress_line if encoding is None or encoding.writes else None
    field, of_sources = _fields(options.field, {text.partition("=")[0] for text in options.weighted})
    if options.weighted:
        if options.sources:
            raise DataError("SOURCE and --source exclude each other; give every source as --source NAME=PATH[@WEIGHT]")
        settings = Settings(
            tokenizer=options.tokenizer, shard_mb=options.shard_mb, heldout=options.heldout, workers=options.workers,
            encoding=encoding, progress=progress, field=field, allow_left_out=options.allow_left_out,
            end_token=options.end_token, allow_lossy=options.allow_lossy,
        )  # fmt: skip
        sources = _with_fields([WeightedSource.parse(text) for text in options.weighted], of_sources)
        mixed = pack_weighted(sources, options.out, settings, licence=options.licence, overwrite=options.overwrite)
        return mixed, {
            "fingerprint": mixed.mixture.fingerprint,
            **asdict(mixed.mixture),
            "accounts": [account.to_json() for account in mixed.accounts],
        }
    packed = pack(
        options.sources, options.out, tokenizer=options.tokenizer, shard_mb=options.shard_mb,
        heldout=options.heldout, licence=options.licence, overwrite=options.overwrite, workers=options.workers,
        encoding=encoding, progress=progress, field=field, allow_left_out=options.allow_left_out,
        end_token=options.end_token, allow_lossy=options.allow_lossy,
    )  # fmt: skip
    manifest = packed.manifest
    return packed, {
        "documents": manifest.train.n_documents, "tokens": manifest.train.n_tokens, "vocab_size": manifest.vocab_size,
        "fingerprint": manifest.fingerprint, "lossless": manifest.lossless,
        "loss": asdict(manifest.loss) if manifest.loss else None,
        "sources": [account.to_json() for account in packed.accounts],
    }  # fmt: skip


def _fields(given: list[str], names: set[str]) -> tuple[str, dict[str, str]]:
    """The field of all sources, and those of single ones by the source's name.

    Args:
        given: NAME or SOURCE=NAME, as --field took them.
        names: of the weighted sources; what stands before = and is none of them belongs to the field's name.
    """
    field, of_sources = "text", {}
    for one in given:
        source, _, name = one.partition("=")
        if name and source in names:
            of_sources[source] = name
        else:
            field = one
    return field, of_sources


def _with_fields(sources: list[Any], of_sources: dict[str, str]) -> list[Any]:
    from dataclasses import replace

    return [replace(source, field=of_sources.get(source.name, "")) for source in sources]


def _mpi_encoding() -> Any:
    """The encoding of an MPI job, if mpirun started this process as one of several; else None."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) < 2:
        return None
    from data.encoding import MpiEncoding, mpi_communicator

    return MpiEncoding(mpi_communicator())


def _verify(options: argparse.Namespace) -> int:
    from data.verify import verify

    foreign: list[str] = []
    damages = verify(options.path, progress_line, foreign=foreign)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    for damage in damages:
        print(damage)
    if foreign:
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        print(f"left alone, since they are not the dataset's: {', '.join(foreign[:8])}{more}")
    if not damages:
        print(f"{options.path}: every byte is as it was packed")
    if options.json:
        print_json({"path": str(options.path), "damages": [str(damage) for damage in damages], "foreign": foreign})
    return EXIT_FAILED if damages else EXIT_OK


def _audit(options: argparse.Namespace) -> int:
    from data.audit import audit_run

    report = audit_run(options.run, options.data)
    print(report)
    if options.json:
        print_json({"ok": report.ok, "steps": report.n_steps, "sequences": report.n_sequences,
                          "problems": list(report.problems)})  # fmt: skip
    return EXIT_OK if report.ok else EXIT_FAILED
