"""A run's checkpoint as a folder that `transformers` loads unmodified and vLLM and SGLang know by name.

Slices of the checkpoint go straight into the new files, a few megabytes at a time, whatever the layout that saved it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.dataset import Dataset
from data.errors import DataError
from data.foreign import foreign_tokenizer
from data.mixture import MixedDataset, open_data
from data.tokenizer import Tokenizer, load_tokenizer
from launch.config import Config, ConfigError, from_tables
from launch.hf_folder import INDEX
from launch.hf_readers import reader_notes
from launch.hf_state import flat_chunks, grouped, write_state
from launch.hf_tokenizer import begins_texts, tokenizer_files
from launch.load import committed_checkpoints
from launch.model_card import model_card
from launch.run_tokenizer import KeptTokenizer, kept_tokenizer, mismatch, same_ids
from model.hf_config import export_problems, readable_positions, to_hf
from model.hf_names import HfTensor, hf_tensors, logical_tensors
from parallel.checkpoint import CheckpointError, CheckpointReader, Saved, damaged_files, open_checkpoint, step_of
from parallel.safetensors_file import Entry, write_entries
from parallel.saving import free_bytes

Dtype = Literal["bf16", "fp32"]
_TORCH: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES: dict[Dtype, str] = {"bf16": "bfloat16", "fp32": "float32"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """How a run is exported.

    dtype: of the weights (the bias stays in fp32); None takes the run's own precision, and fp32 with the optimizer.
    step: of the checkpoint; None is the newest. shard_gb: largest file of weights, in 10^9 bytes.
    with_optimizer: keep what training needs, so that an import goes on as if nothing had happened.
    tokenizer: a tokenizer.json, for a run that has none of its own and whose data is gone, or whose data has another.
    prediction_layers: whether they go along; readers that do not know them list their tensors as unexpected.
    """

    dtype: Dtype | None = None
    step: int | None = None
    shard_gb: float = 5.0
    with_optimizer: bool = False
    tokenizer: Path | None = None
    prediction_layers: bool = True


def export(run: Path, out: Path, options: ExportOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Writes the folder under a draft name and renames it when it is whole.

    Returns:
        What was written: folder, step, dtype, tensors, bytes, files; notes on what single readers need.

    Raises:
        ConfigError: everything that stands against it. DataError: the tokenizer cannot be read.
        CheckpointError: a damaged file, named. OSError: the disk refused.
    """
    problems = [f"{out} is already there; give another --out"] if out.exists() else []
    if not options.shard_gb > 0:
        problems.append(f"--shard-gb = {options.shard_gb} must be above 0")
    saved = _checkpoint(run, options.step, problems)
    config = from_tables(saved.manifest["config"])
    if not options.prediction_layers:
        if options.with_optimizer:
            problems.append("--with-optimizer goes on with all of the model; leave out --without-prediction-layers")
        config = replace(config, model=replace(config.model, num_nextn_predict_layers=0))
    problems += export_problems(config.model)
    config, notes = _within_reach(config, options, problems)
    dtype: Dtype = options.dtype or ("fp32" if options.with_optimizer else config.train.precision)
    if options.with_optimizer and dtype != "fp32":
        problems.append("--with-optimizer needs --dtype fp32: training goes on from the fp32 weights")
    if options.with_optimizer and saved.manifest.get("weights_only"):
        problems.append(f"--with-optimizer: {saved.path} has weights only; it was imported and not trained since")
    if options.with_optimizer and config.model.scoring_func == "sigmoid" and not config.model.uses_bias:
        problems.append(
            f'--with-optimizer: model.topk_method = "{config.model.topk_method}" is exported as noaux_tc with a bias '
            "of zeros, the same function but another configuration; export without it"
        )
    if problems:
        raise ConfigError(problems)
    entries = _entries(config, CheckpointReader(saved), dtype)
    weights = sum(entry.n_bytes for entry in entries)
    moments = 2 * sum(4 * torch.Size(shape).numel() for shape in _trained(config).values())
    total = weights + (moments if options.with_optimizer else 0)
    if free_bytes(out.parent) < total:
        free = free_bytes(out.parent) / 2**30
        raise ConfigError([f"{out.parent} has {free:,.1f} GiB free, and the folder needs {total / 2**30:,.1f} GiB"])
    wrong = damaged_files(saved)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    tokenizer, kept, dataset = _tokenizer(run, config, options.tokenizer)
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        notes += reader_notes(config.model, tokenizer)
        for name, text in _texts(run, saved, config, tokenizer, kept, dataset, dtype, weights, notes).items():
            (draft / name).write_text(text, encoding="utf-8")
        told = _write(draft, config, saved, entries, dtype, options, total, progress)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if dataset is not None:
            dataset.close()
    return {"folder": str(out), "step": saved.step, "dtype": dtype, **told, "notes": notes}


def _within_reach(config: Config, options: ExportOptions, problems: list[str]) -> tuple[Config, list[str]]:
    """The configuration with no more positions than YaRN reaches, and a note where that took some away."""
    model, most = config.model, readable_positions(config.model)
    if most == model.max_position_embeddings or model.rope_scaling is None:
        return config, []
    yarn = model.rope_scaling
    told = (
        f"model.max_position_embeddings = {model.max_position_embeddings} exceeds rope_scaling.factor * "
        f"original_max_position_embeddings = {yarn.factor:g} * {yarn.original_max_position_embeddings} = {most}, where "
        "vLLM's table of angles ends and its engine dies"
    )
    if options.with_optimizer or config.data.seq_len > most:
        why = "--with-optimizer keeps the model as it is" if options.with_optimizer else (
            f"data.seq_len = {config.data.seq_len} was trained on"
        )  # fmt: skip
        problems.append(
            f"{told}; {why}, so that config.json cannot say {most}: train with max_position_embeddings = {most}"
        )
        return config, []
    return replace(config, model=replace(model, max_position_embeddings=most)), [f"{told}; config.json says {most}"]


def _checkpoint(run: Path, step: int | None, problems: list[str]) -> Saved:
    found = {step_of(path): path for path in committed_checkpoints(run)}
    if step is not None and step not in found:
        problems.append(f"--step {step}: {run} has checkpoints of the steps {', '.join(map(str, found))}")
        step = None
    return open_checkpoint(found[max(found) if step is None else step])


def _trained(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the optimizer moves: all but the balancing biases."""
    found = logical_tensors(config.model)
    return {one.name: one.shape for one in found if not one.parts[0].fp32}


def _tokenizer(
    run: Path, config: Config, given: Path | None
) -> tuple[Tokenizer, KeptTokenizer | None, Dataset | MixedDataset | None]:
    """The model's tokenizer, what the run keeps of it, and the run's data for the card where that is at hand.

    Raises:
        ConfigError: the data, or the file that was given, has another tokenizer than the model.
        DataError: there is none.
    """
    kept = kept_tokenizer(run)
    try:
        dataset = open_data(config.data) if config.data.mode == "indexed" else None
        of_data = dataset.tokenizer if dataset else foreign_tokenizer(config.data)
    except DataError as error:
        if given is None and kept is None:
            raise DataError(f"{error}. The run's tokenizer lies there; --tokenizer FILE gives it otherwise") from error
        dataset, of_data = None, None
    own = kept.tokenizer if kept is not None else of_data
    tokenizer = load_tokenizer(given) if given is not None else own
    assert tokenizer is not None
    if given is not None and own is not None and not same_ids(own, tokenizer):
        raise ConfigError(
            [f"--tokenizer {given} is not the tokenizer of {kept.path if kept else config.data.path}; leave it out"]
        )
    if given is None and kept is not None and of_data is not None:
        wrong = mismatch(f"data.path = {config.data.path}", of_data, kept.path, kept.tokenizer)
        if wrong is not None:
            raise ConfigError([f"{wrong}; --tokenizer {kept.path} exports the model with its own"])
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            [f"the tokenizer {given or tokenizer.spec} has {tokenizer.vocab_size} tokens, the model "
             f"{config.model.vocab_size}"]
        )  # fmt: skip
    return own or tokenizer, kept, dataset


def _entries(config: Config, reader: CheckpointReader, dtype: Dtype) -> list[Entry]:
    """Every tensor of the folder, to be read from the checkpoint when its turn comes."""

    def entry(tensor: HfTensor) -> Entry:
        kind = torch.float32 if tensor.fp32 else _TORCH[dtype]

        def chunks() -> Iterator[Tensor]:
            if not tensor.source:
                yield torch.zeros(tensor.shape, dtype=kind)
                return
            for values in flat_chunks(reader, tensor.source, "weight", tensor.start, tensor.start + tensor.numel):
                yield values.to(kind)

        return Entry(tensor.name, kind, tensor.shape, chunks)

    return [entry(tensor) for tensor in hf_tensors(config.model)]


def _write(
    draft: Path,
    config: Config,
    saved: Saved,
    entries: list[Entry],
    dtype: Dtype,
    options: ExportOptions,
    total: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Weights, their index, and the optimizer's state if it is wanted."""
    done = 0

    def more(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    file_bytes = int(options.shard_gb * 1e9)
    groups = grouped(entries, file_bytes)
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        digests[file] = write_entries(draft / file, group, metadata={"format": "pt"})["sha256"]
        weight_map |= {entry.key: file for entry in group}
        more(sum(entry.n_bytes for entry in group))
    n_bytes = sum(entry.n_bytes for entry in entries)
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if options.with_optimizer:
        write_state(draft, CheckpointReader(saved), _trained(config), digests, file_bytes, more)
    return {"tensors": len(entries), "bytes": n_bytes, "files": len(groups), "optimizer": options.with_optimizer}


def _texts(
    run: Path,
    saved: Saved,
    config: Config,
    tokenizer: Tokenizer,
    kept: KeptTokenizer | None,
    dataset: Dataset | MixedDataset | None,
    dtype: Dtype,
    n_bytes: int,
    notes: list[str],
) -> dict[str, str]:
    """Everything that is text, by file name."""
    eod = tokenizer.eod_id
    settings = to_hf(config.model, dtype=_NAMES[dtype], bos_token_id=eod, eos_token_id=eod)
    settings |= kept.ids if kept is not None else {}
    datasets = dataset.datasets if isinstance(dataset, MixedDataset) else (dataset,) if dataset else ()
    return {
        "config.json": json.dumps(settings, indent=2) + "\n",
        **tokenizer_files(tokenizer, config.model.max_position_embeddings, kept),
        "README.md": model_card(
            run, saved, config, datasets, tokenizer.spec, dtype, n_bytes, begins_texts(tokenizer, kept), notes
        ),
    }
