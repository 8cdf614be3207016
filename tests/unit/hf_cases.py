"""Random small models of the DeepSeek-V3 and V2 shapes, runs that hold them, and folders made by hand."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import Config, dump, from_tables
from launch.hf_import import ImportOptions, import_folder
from launch.runfolder import RunFolder
from model.config import ModelConfig, YarnConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.naming import pieces
from model.slots import local_experts
from model.transformer import Transformer
from parallel.checkpoint import CheckpointReader, open_checkpoint
from parallel.safetensors_file import write
from parallel.whole_checkpoint import StateTensor, write_whole

DATA = "hf-cases-no-data"  # a run here is exported with --tokenizer; its data is not looked at


def random_config(seed: int, kind: str) -> ModelConfig:
    """A small legal configuration; `kind` is v3 or v2. All kinds of attention, groups, YaRN and depth come up."""
    draw = random.Random(seed)
    heads, n_group = draw.choice([1, 2, 4]), draw.choice([1, 2, 4])
    experts = n_group * draw.choice([2, 3, 4])
    topk_group = draw.randint(1, n_group)
    layers = draw.randint(1, 4)
    yarn = YarnConfig(
        factor=draw.choice([1.0, 4.0, 40.0]),
        original_max_position_embeddings=draw.choice([16, 64]),
        beta_fast=draw.choice([32.0, 8.0]),
        mscale=draw.choice([1.0, 0.707, 0.0]),
        mscale_all_dim=draw.choice([1.0, 0.707, 0.0]),
    )
    greedy = kind == "v2" and draw.random() < 0.5
    return ModelConfig(
        vocab_size=draw.choice([257, 300]),
        hidden_size=heads * draw.choice([16, 24]),
        num_hidden_layers=layers,
        num_nextn_predict_layers=draw.choice([0, 1, 2]) if kind == "v3" else 0,
        num_attention_heads=heads,
        q_lora_rank=draw.choice([None, 6, 16]),
        kv_lora_rank=draw.choice([4, 10]),
        qk_nope_head_dim=draw.choice([4, 6]),
        qk_rope_head_dim=draw.choice([2, 4, 8]),
        v_head_dim=draw.choice([4, 5, 16]),
        max_position_embeddings=128,
        rope_theta=draw.choice([10000.0, 500.0]),
        rope_scaling=draw.choice([None, yarn, yarn]),
        intermediate_size=draw.choice([16, 20]),
        moe_intermediate_size=draw.choice([4, 6]),
        first_k_dense_replace=draw.randint(0, layers),
        n_routed_experts=experts,
        n_shared_experts=draw.choice([1, 2]),
        num_experts_per_tok=draw.randint(1, topk_group * experts // n_group),
        n_group=1 if greedy else n_group,
        topk_group=1 if greedy else topk_group,
        scoring_func="sigmoid" if kind == "v3" else "softmax",
        topk_method="noaux_tc" if kind == "v3" else "greedy" if greedy else "group_limited_greedy",
        norm_topk_prob=kind == "v3" and draw.random() < 0.7,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        initializer_range=draw.choice([0.05, 0.1]),
    )


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with random weights, norms and (where it reads one) balancing biases that matter."""
    model = Transformer(config, LocalExchange())
    with torch.no_grad():
        init_weights(model, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for name, buffer in model.named_buffers():
            if config.uses_bias and name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model.eval()


def logical(model: Transformer) -> dict[str, Tensor]:
    """The model's weights and biases under their logical names."""
    found = {}
    experts = local_experts(model)
    for name, parameter in model.named_parameters():
        for piece in pieces(name, tuple(parameter.shape), experts.get(name, ())):
            flat = parameter.detach().reshape(-1)[piece.start : piece.start + piece.numel]
            found[piece.logical_name] = flat.view(piece.shape)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            found[name] = buffer
    return found


def make_run(folder: Path, model: Transformer, moments: bool = False, **train: Any) -> Path:
    """A run's folder with one checkpoint of step 7."""
    config = from_tables({"data": {"path": DATA, "seq_len": 16}, "train": train, "balance": {"rule": "none"}})
    config = replace(config, model=model.config)
    run = RunFolder(folder)
    run.create(dump(config))
    tensors = []
    for name, values in logical(model).items():
        tensors.append(StateTensor(name, tuple(values.shape), "weight", lambda values=values: [values]))
        if moments and "e_score_correction_bias" not in name:
            for kind, factor in (("exp_avg", 0.5), ("exp_avg_sq", 2.0)):
                moment = values * values * factor
                tensors.append(StateTensor(name, tuple(values.shape), kind, lambda moment=moment: [moment]))
    extra = {
        "weights_only": not moments, "optimizer_steps": 7, "tokens": 1234, "cursor": None, "fingerprint": "",
        "layout": {"world_size": 2, "ep_size": 1, "zero_stage": 1}, "random_states": [], "balancer": {}, "alarms": {},
        "guard": {}, "config": asdict(config),
    }  # fmt: skip
    write_whole(run.checkpoints, 7, tensors, extra, 10_000)
    run.close()
    return folder


def load_model(reader: CheckpointReader, config: ModelConfig) -> Transformer:
    """The model that a checkpoint holds."""
    model = Transformer(config, LocalExchange())
    with torch.no_grad():
        for name, values in logical(model).items():
            values.copy_(reader.read(name, "weight", 0, values.numel()).view_as(values))
    return model.eval()


def bytes_tokenizer(folder: Path) -> Path:
    """The bytes tokenizer as a file."""
    from data.tokenizer import ByteTokenizer

    path = folder / "bytes.json"
    path.write_text(ByteTokenizer().to_json())
    return path


def training_config(folder: Path) -> Path:
    """A TOML file for everything but the model."""
    path = folder / "training.toml"
    path.write_text(f'[data]\npath = "{DATA}"\nseq_len = 16\n[balance]\nrule = "none"\n')
    return path


def bring_in(folder: Path, work: Path, **options: Any) -> CheckpointReader:
    """Imports a folder into work/imported and opens its checkpoint."""
    asked = {"config": str(training_config(work)), **options}
    told = import_folder(folder, work / "imported", ImportOptions(**asked))
    saved = open_checkpoint(work / "imported" / "checkpoints" / f"step-{told['step']:08d}")
    return CheckpointReader(saved)


def write_folder(folder: Path, config: dict[str, Any], *files: dict[str, Tensor]) -> Path:
    """A Hugging Face folder by hand: config.json, one safetensors file for each of `files`, and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write(folder / file, tensors.items())
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def model_config_of(run: Path) -> ModelConfig:
    """The model section of a run's config.toml."""
    from launch.config import read

    config: Config = read(str(run / "config.toml"), [], [])
    return config.model
