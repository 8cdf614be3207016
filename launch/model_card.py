"""The model card of an exported run: what it is, what it saw and under which licences, how it did."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from launch.config import Config
from launch.runfolder import RunFolder, read_records
from model.count import count_parameters
from model.hf_config import model_type
from parallel.checkpoint import Saved

WINDOW = 20  # steps that a figure is averaged over


def model_card(
    run: Path,
    saved: Saved,
    config: Config,
    datasets: Iterable[Dataset],
    tokenizer: str,
    dtype: str,
    n_bytes: int,
    begins: bool = True,
    notes: Sequence[str] = (),
) -> str:
    """README.md with its front matter.

    Args:
        saved: the checkpoint that was exported. datasets: what it was trained on, empty where that is not at hand.
        tokenizer: its specification. n_bytes: of the weights.
        begins: whether the exported tokenizer puts the end-of-document token before a text by itself.
        notes: what single readers need to be told.
    """
    records = _records(run, saved.step)
    sources = [source for dataset in datasets for source in dataset.manifest.sources]
    licences = sorted({source.licence for source in sources if source.licence})
    name = run.resolve().name
    parts = [
        *_front(licences),
        f"# {name}",
        "",
        f"A mixture-of-experts language model of the {_family(config)} shape, trained with Trimtab and exported after "
        f"{saved.step:,} steps. It is what its data made it: a model for study, not tuned to follow instructions or to "
        "be safe.",
        "",
        "## Model",
        "",
        *_table(_model(config, dtype, n_bytes, tokenizer)),
        "",
        "## Data",
        "",
        *_data(sources, config),
        "",
        "## Training",
        "",
        *_table(_training(saved, config)),
        "",
        "## How it did",
        "",
        *_table(_figures(run, saved, records)),
        "",
        "`max_vio` is the load of the busiest expert above the mean, divided by the mean, averaged over layers: 0 is "
        "perfect balance (arXiv 2408.15664). "
        f"Loss and balance are means over at most the last {WINDOW} steps.",
        "",
        "## Use",
        "",
        *_use(config, begins, notes),
    ]
    return "\n".join(parts) + "\n"


def _front(licences: Sequence[str]) -> list[str]:
    # The weights' licence is their owner's to choose; the data's are listed in the table.
    note = f"  # the data is under {', '.join(licences)}" if licences else ""
    return ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: unknown{note}", "---", ""]


def _family(config: Config) -> str:
    return "DeepSeek-V3" if model_type(config.model) == "deepseek_v3" else "DeepSeek-V2"


def _model(config: Config, dtype: str, n_bytes: int, tokenizer: str) -> dict[str, Any]:
    model, count = config.model, count_parameters(config.model)
    layers = f"{model.num_hidden_layers}, the first {model.first_k_dense_replace} dense"
    if model.num_nextn_predict_layers:
        layers += f"; {model.num_nextn_predict_layers} multi-token prediction layer(s) besides"
    return {
        "parameters": f"{count.main:,}, of which a token uses {count.active:,}"
        + (f"; prediction layers {count.mtp:,}" if count.mtp else ""),
        "layers": layers,
        "width, heads": f"{model.hidden_size}, {model.num_attention_heads} heads of multi-head latent attention",
        "experts": f"{model.n_routed_experts} routed in {model.n_group} group(s), {model.num_experts_per_tok} a token; "
        f"{model.n_shared_experts} shared",
        "context": f"{config.data.seq_len} tokens in training, positions up to {model.max_position_embeddings}",
        "tokenizer": f"{tokenizer}; {model.vocab_size} rows in the embedding",
        "weights": f"{dtype}, {n_bytes / 1e6:,.1f} MB",
    }


def _data(sources: Sequence[Any], config: Config) -> list[str]:
    if not sources:
        return [f"Not at hand when this card was written (data.mode = {json.dumps(config.data.mode)})."]
    rows = ["| source | licence | documents | bytes |", "|---|---|---|---|"]
    return rows + [
        f"| {_cell(one.name)} | {_cell(one.licence or 'unknown')} | {one.n_documents:,} | {one.n_bytes:,} |"
        for one in sources
    ]


def _training(saved: Saved, config: Config) -> dict[str, Any]:
    layout = saved.manifest.get("layout", {})
    optimizer, balance = config.optimizer, config.balance
    return {
        "steps, tokens": f"{saved.step:,} steps, {saved.manifest.get('tokens', 0):,} tokens",
        "batch": f"{config.train.global_batch_size} sequences of {config.data.seq_len} tokens",
        "optimizer": f"AdamW, learning rate {optimizer.lr:g} ({optimizer.schedule}), weight decay "
        f"{optimizer.weight_decay:g}, gradients clipped at {optimizer.grad_clip:g}",
        "precision": config.train.precision,
        "balance": f"rule {balance.rule}, rate {balance.full_rate:g}",
        "layout": f"{layout.get('world_size', '?')} rank(s), expert parallelism {layout.get('ep_size', '?')}, ZeRO "
        f"stage {layout.get('zero_stage', '?')}",
    }


def _figures(run: Path, saved: Saved, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = records[-WINDOW:]
    found: dict[str, Any] = {}
    for title, key, digits in (
        ("training loss, nats a token", "loss", 4),
        ("max_vio", "max_vio", 3),
        ("experts without a token", "dead_experts", 2),
        ("largest balancing bias", "bias_abs_max", 4),
    ):
        known = [record[key] for record in last if isinstance(record.get(key), int | float)]
        found[title] = f"{sum(known) / len(known):.{digits}f}" if known else "not recorded"
    evaluations = [
        event
        for event in read_records(RunFolder(run).events_path)
        if event.get("kind") == "evaluation" and event.get("step") == saved.step
    ]
    if evaluations:
        one = evaluations[-1]
        found["held-out loss, nats a token"] = f"{one['heldout_loss']:.4f} ({one['heldout_tokens']:,} tokens)"
        found["held-out bits per byte"] = (
            f"not given: {one['bits_per_byte_absent']}"
            if one.get("bits_per_byte_absent")
            else f"{one['bits_per_byte']:.4f} (gzip -9: {one['gzip_bits_per_byte']:.4f})"
        )
    else:
        found["held-out loss"] = "not evaluated at this step"
    return found


def _use(config: Config, begins: bool, notes: Sequence[str]) -> list[str]:
    prompt = '"def "' if begins else 'tokenizer.bos_token + "def "'
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        f'ids = tokenizer({prompt}, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
    ]
    if not begins:
        lines += ["", "Every text began with the end token in training; this tokenizer does not add it by itself."]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if config.model.num_nextn_predict_layers and model_type(config.model) == "deepseek_v3":
        layer = config.model.num_hidden_layers
        layers = "|".join(str(layer + k) for k in range(config.model.num_nextn_predict_layers))
        lines += [
            "",
            f"transformers knows prediction layers at number 61 only and reports those of this model ({layers}) as "
            "unexpected, which is harmless. `generate(use_mtp=True)` finds them after",
            "",
            "```python",
            rf'model._keys_to_ignore_on_load_unexpected = {{r"model\.layers\.({layers})\..*"}}',
            "```",
        ]
    return lines


def _records(run: Path, step: int) -> list[dict[str, Any]]:
    return [record for record in RunFolder(run).committed("metrics") if record["step"] <= step]


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
