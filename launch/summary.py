"""What a finished run says for itself: figures from its files, held-out bits per byte, a completion, what next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.foreign import NOT_RESUMABLE
from launch.accounting import in_words, read_account
from launch.byte_figures import byte_figures, why_no_bits
from launch.evaluate import evaluate
from launch.load import load_run
from launch.report import summarize, write_report
from launch.runfolder import RunFolder, read_records
from launch.tensorboard import how_to_view
from model.generate import generate

PROMPT = "def "


def summarize_run(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluates the newest checkpoint in this process, writes the report, and prints the summary.

    The checkpoint was written by all ranks; that one process reads it back is part of the proof.

    Args:
        folder: the run's folder.
        say: receives the lines.

    Returns:
        The summary's figures, also stored as an `evaluation` event.
    """
    loaded = load_run(folder)
    run = RunFolder(folder)
    if loaded.dataset is None:
        say(f"summary: no held-out documents to evaluate; {NOT_RESUMABLE}")
        write_report(folder)
        return show_summary(folder, say)
    with loaded.dataset as dataset:
        eod_id = dataset.manifest.eod_id
        documents = list(dataset.heldout_documents())
        if not documents:
            say("summary: the data holds no document out, so there is nothing to evaluate; pack it with --heldout 0.02")
            write_report(folder)
            return show_summary(folder, say)
        say(f"summary: evaluating {len(documents)} held-out documents and compressing the same bytes with gzip and xz")
        result = evaluate(loaded.model, documents, eod_id, loaded.config.data.seq_len)
        prompt = [eod_id, *dataset.tokenizer.encode(PROMPT).tolist()]
        new = list(generate(loaded.model, prompt, 48, temperature=0.0, eod_id=eod_id, max_context=256))
        completion = PROMPT + dataset.tokenizer.decode(new)
        bits = byte_figures(result, why_no_bits(dataset))
    run.event(
        "evaluation",
        cause="end of training",
        step=loaded.saved.step,
        heldout_loss=result.loss,
        **bits,
        heldout_bytes=result.raw_bytes,
        heldout_tokens=result.n_tokens,
        completion=completion,
    )
    run.close()
    write_report(folder)
    return show_summary(folder, say)


def show_summary(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Prints the summary of a run from its files; held-out figures are those of its last evaluation, if there was one.

    Args:
        folder: the run's folder.
        say: receives the lines.
    """
    figures = figures_of(folder)
    for line in lines(figures, RunFolder(folder)):
        say(line)
    return figures


def figures_of(folder: Path) -> dict[str, Any]:
    """The figures of the summary, from the run's files."""
    run = RunFolder(folder)
    evaluations = [event for event in read_records(run.events_path) if event.get("kind") == "evaluation"]
    saves = [event for event in read_records(run.events_path) if event.get("kind") == "save"]
    return {
        **summarize(folder),
        **(evaluations[-1] if evaluations else {}),
        "checkpoint": saves[-1]["path"] if saves else None,
        "report": str(run.report),
    }


def lines(figures: dict[str, Any], run: RunFolder) -> list[str]:
    """The summary as text."""

    def number(key: str, pattern: str) -> str:
        value = figures.get(key)
        return format(value, pattern) if value is not None else "-"

    heldout = ["  held-out          not evaluated"]
    completion = [
        "  completion        of `def `, greedy:",
        *("      | " + line for line in (figures.get("completion") or "").splitlines()[:12]),
    ]
    if figures.get("bits_per_byte_absent"):
        heldout = [
            f"  held-out          loss {number('heldout_loss', '.3f')} nats a token; no bits per byte, since "
            f"{figures['bits_per_byte_absent']}",
            *completion,
        ]
    elif figures.get("bits_per_byte") is not None:
        better = figures["bits_per_byte"] < figures["gzip_bits_per_byte"]
        heldout = [
            f"  held-out          {number('bits_per_byte', '.3f')} bits per byte; "
            f"gzip -9 {number('gzip_bits_per_byte', '.3f')}, xz -9 {number('xz_bits_per_byte', '.3f')} "
            f"on the same {number('heldout_bytes', ',d')} bytes{' (below gzip)' if better else ''}",
            *completion,
        ]
    try:
        shown = run.path.relative_to(Path.cwd())
    except ValueError:
        shown = run.path
    without_bias = [
        f"    .venv/bin/trimtab train {shown}/config.toml balance.rule=none --launcher local --run {shown}-no-bias",
        f"    .venv/bin/trimtab compare {shown} {shown}-no-bias",
    ]
    if not figures.get("bias_abs_max"):  # this is the run without it
        without_bias = []
    account = read_account(run)
    return [
        "",
        f"  Run {run.path.name}: {figures.get('steps', '-')} steps",
        f"  loss              {number('loss_first', '.3f')} -> {number('loss_last', '.3f')} nats a token",
        f"  speed             {number('tokens_per_second', ',.0f')} tokens/s (median)",
        *([f"  time              {in_words(account)}"] if account else []),
        f"  max_vio           {number('max_vio_first', '.2f')} -> {number('max_vio_last', '.2f')} "
        f"(0 is perfect balance; noise floor {number('max_vio_floor', '.2f')})",
        *heldout,
        f"  checkpoint        {figures['checkpoint']}",
        f"  report            {figures['report']}",
        "",
        "  What next:",
        f"    .venv/bin/{how_to_view(shown)}",
        f"    .venv/bin/trimtab generate {shown} --prompt 'import ' --temperature 0.8",
        f"    .venv/bin/trimtab data audit {shown}",
        *without_bias,
        "",
    ]
