"""A Hugging Face folder as a run: bit for bit, stacked and fp8 weights, and every bad folder by its name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import hf_weights
from launch.config import ConfigError, read
from launch.hf_export import ExportOptions, export
from launch.hf_import import ImportOptions, import_folder
from launch.hf_weights import gathered
from model.config import ModelConfig
from model.hf_config import to_hf
from model.hf_names import hf_tensors
from parallel.checkpoint import CheckpointReader, open_checkpoint
from tests.unit import hf_cases

SMALL = replace(
    hf_cases.random_config(3, "v3"), hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
    first_k_dense_replace=1, num_nextn_predict_layers=1, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=2, rope_scaling=None,
)  # fmt: skip


def theirs(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """The folder's tensors for random weights."""
    ours = hf_cases.logical(hf_cases.random_model(config, seed))
    return {
        one.name: ours[one.source].reshape(-1)[one.start : one.start + one.numel].reshape(one.shape).clone()
        for one in hf_tensors(config)
    }


def table(config: ModelConfig, **more: Any) -> dict[str, Any]:
    return {**to_hf(config, dtype="float32", bos_token_id=0, eos_token_id=0), **more}


def same_as(reader: Any, config: ModelConfig, seed: int = 0) -> None:
    for name, values in hf_cases.logical(hf_cases.random_model(config, seed)).items():
        assert torch.equal(reader.read(name, "weight", 0, values.numel()), values.reshape(-1)), name


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_there_and_back_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_weights, "CHUNK", 64)  # so that tensors come in many pieces
    for seed in range(3):
        work = tmp_path / str(seed)
        work.mkdir()
        config = hf_cases.random_config(seed, kind)
        run = hf_cases.make_run(work / "run", hf_cases.random_model(config, seed))
        asked = ExportOptions(tokenizer=hf_cases.bytes_tokenizer(work), shard_gb=1e-5)
        export(run, work / "hf", asked)
        reader = hf_cases.bring_in(work / "hf", work, shard_gb=2e-5)
        assert hf_cases.model_config_of(work / "imported") == config
        same_as(reader, config, seed)
        manifest = reader.saved.manifest
        assert manifest["weights_only"] and manifest["step"] == 0 and manifest["optimizer_steps"] == 0
        assert not reader.read("norm.weight", "exp_avg", 0, config.hidden_size).any()  # moments that are not there


def test_stacked_experts_and_half_precision(tmp_path: Path) -> None:
    tensors = {name: values.to(torch.float16) for name, values in theirs(SMALL).items()}
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts"
        both = [[tensors.pop(f"{stem}.{e}.{leaf}_proj.weight") for leaf in ("gate", "up", "down")] for e in range(4)]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in both])
        tensors[f"{stem}.down_proj"] = torch.stack([down for _, _, down in both])
    del tensors["model.layers.2.embed_tokens.weight"]  # a copy need not be there
    reader = hf_cases.bring_in(hf_cases.write_folder(tmp_path / "hf", table(SMALL), tensors), tmp_path)
    for name, values in hf_cases.logical(hf_cases.random_model(SMALL, 0)).items():
        wanted = values.to(torch.float16).float().reshape(-1)
        assert torch.equal(reader.read(name, "weight", 0, values.numel()), wanted), name


def quantised(tensors: dict[str, Tensor], block: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projections in fp8 with scales, and what they stand for, computed here one block at a time."""
    folder, meant = {}, {}
    for name, values in tensors.items():
        meant[name] = values
        if not name.endswith("_proj.weight") or "eh_proj" in name:
            folder[name] = values
            continue
        rows, columns = values.shape
        scales = torch.ones(-(-rows // block[0]), -(-columns // block[1]))
        eight, meant[name] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), values.clone()
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[i, j] = values[part].abs().max() / 448
                eight[part] = (values[part] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[name][part] = eight[part].float() * scales[i, j]
        folder[name], folder[f"{name}_scale_inv"] = eight, scales
    return folder, meant


@pytest.mark.parametrize("stacked", [False, True])
def test_fp8_blocks(stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_weights, "CHUNK", 100)
    block = (3, 5)
    folder, meant = quantised(theirs(SMALL), block)
    if stacked:
        stem = "model.layers.1.mlp.experts"
        for suffix in ("", "_scale_inv"):
            down = [folder.pop(f"{stem}.{e}.down_proj.weight{suffix}") for e in range(4)]
            folder[f"{stem}.down_proj{suffix}"] = torch.stack(down)
            for e in range(4):
                if suffix:
                    continue
                for leaf in ("gate", "up"):  # blocks do not cross from gate to up where the width is no multiple
                    folder.pop(f"{stem}.{e}.{leaf}_proj.weight_scale_inv")
                    folder[f"{stem}.{e}.{leaf}_proj.weight"] = meant[f"{stem}.{e}.{leaf}_proj.weight"]
        both = [[folder.pop(f"{stem}.{e}.{leaf}_proj.weight") for leaf in ("gate", "up")] for e in range(4)]
        folder[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
    told = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    made = hf_cases.write_folder(tmp_path / "hf", table(SMALL, quantization_config=told), folder)
    reader = hf_cases.bring_in(made, tmp_path)
    for one in hf_tensors(SMALL):
        found = reader.read(one.source, "weight", one.start, one.start + one.numel).view(one.shape)
        assert torch.equal(found, meant[one.name]), one.name


def test_missing_unknown_and_misshapen_are_listed_together(tmp_path: Path) -> None:
    tensors = theirs(SMALL)
    for expert in range(4):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # harmless
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
    folder = hf_cases.write_folder(tmp_path / "hf", table(SMALL), tensors)
    with pytest.raises(ConfigError) as refused:
        hf_cases.bring_in(folder, tmp_path)
    for said in (
        "4 tensors are missing: model.layers.1.mlp.experts.{0-3}.up_proj.weight (4)",
        "1 tensors are unknown: model.layers.0.self_attn.q_norm.weight",
        "model.norm.weight has shape [31], config.json makes it [32]",
        "lm_head.weight is I32",
    ):
        assert any(said in problem for problem in refused.value.problems), (said, refused.value.problems)
    assert len(refused.value.problems) == 4
    assert not (tmp_path / "imported").exists()


def test_a_prediction_layer_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    tensors = theirs(SMALL)
    tensors["model.layers.2.shared_head.head.weight"][5, 3] += 1
    folder = hf_cases.write_folder(tmp_path / "hf", table(SMALL), tensors)
    with pytest.raises(ConfigError, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        hf_cases.bring_in(folder, tmp_path)


def test_prediction_layers_that_were_not_saved_are_left_out_with_a_note(tmp_path: Path) -> None:
    tensors = {name: one for name, one in theirs(SMALL).items() if "layers.2." not in name}
    folder = hf_cases.write_folder(tmp_path / "hf", table(SMALL), tensors)
    asked = ImportOptions(config=str(hf_cases.training_config(tmp_path)))
    told = import_folder(folder, tmp_path / "imported", asked)
    assert "the folder holds none" in told["notes"][0]
    assert hf_cases.model_config_of(tmp_path / "imported") == replace(SMALL, num_nextn_predict_layers=0)


def damage(kind: str, folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    settings = json.loads((folder / "config.json").read_text())
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "auto_map":
        settings["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    elif kind == "trust_remote_code":
        settings["trust_remote_code"] = True
    elif kind == "int4":
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif kind == "missing shard":
        second.unlink()
    elif kind == "cut shard":
        second.write_bytes(second.read_bytes()[:-10])
    elif kind == "cut header":
        second.write_bytes(second.read_bytes()[:20])
    elif kind == "pickle in a safetensors name":
        second.write_bytes(b"\x80\x04\x95" + b"x" * 100)
    elif kind == "pickle only":
        for path in (first, second, index):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif kind == "pickle in the index":
        index.write_text(index.read_text().replace(second.name, "pytorch_model-00002.bin"))
    elif kind == "no weights":
        for path in (first, second, index):
            path.unlink()
    elif kind == "index outside":
        index.write_text(index.read_text().replace(second.name, "../" + second.name))
    elif kind == "index lies":
        index.write_text(index.read_text().replace(second.name, first.name))
    elif kind == "no index map":
        index.write_text("{}")
    elif kind == "mixtral":
        settings["model_type"] = "mixtral"
    elif kind == "wrong type":
        settings["hidden_size"] = "32"
    elif kind == "wrong size":
        settings["moe_intermediate_size"] += 2
    if (folder / "config.json").is_file() and kind != "config no JSON":
        (folder / "config.json").write_text(json.dumps(settings))


BAD = {
    "no config": "config.json is missing",
    "config no JSON": "config.json cannot be read",
    "auto_map": "--ignore-auto-map",
    "trust_remote_code": "asks for code of its own",
    "int4": "quantization_config",
    "missing shard": "model-00002-of-00002.safetensors is missing",
    "cut shard": "model-00002-of-00002.safetensors is cut short",
    "cut header": "model-00002-of-00002.safetensors",
    "pickle in a safetensors name": "model-00002-of-00002.safetensors",
    "pickle only": "pytorch_model.bin is not safetensors but a pickle",
    "pickle in the index": "pytorch_model-00002.bin is not safetensors but a pickle",
    "no weights": "holds neither",
    "index outside": "is not a file of this folder",
    "index lies": "says that",
    "no index map": "has no weight_map",
    "mixtral": "model_type = 'mixtral' cannot be imported: grouped-query attention",
    "wrong type": 'model.hidden_size = "32" must be an integer',
    "wrong size": "has shape",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_folders_are_named(kind: str, tmp_path: Path) -> None:
    tensors = theirs(SMALL)
    names = list(tensors)
    halves = [{name: tensors[name] for name in part} for part in (names[:20], names[20:])]
    folder = hf_cases.write_folder(tmp_path / "hf", table(SMALL), *halves)
    damage(kind, folder)
    with pytest.raises(ConfigError) as refused:
        hf_cases.bring_in(folder, tmp_path)
    assert BAD[kind] in str(refused.value) and str(folder) in str(refused.value)
    assert not (tmp_path / "imported").exists() and not (tmp_path / ".imported.draft").exists()


def test_code_of_the_folder_may_be_left_alone(tmp_path: Path) -> None:
    told = table(SMALL, auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    folder = hf_cases.write_folder(tmp_path / "hf", told, theirs(SMALL))
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    same_as(hf_cases.bring_in(folder, tmp_path, ignore_auto_map=True), SMALL)


def test_the_place_and_the_configuration_are_checked(tmp_path: Path) -> None:
    folder = hf_cases.write_folder(tmp_path / "hf", table(SMALL), theirs(SMALL))
    for asked, said in (
        (ImportOptions(), "--config is needed"),
        (ImportOptions(config="debug", assignments=("model.hidden_size=3",)), "the model is what the folder holds"),
        (ImportOptions(config="debug", assignments=("data.seq_len=4096",)), "longer than model.max_position"),
        (ImportOptions(config="debug", assignments=("checkpoint.dir=/x",)), "checkpoint.dir"),
    ):
        with pytest.raises(ConfigError, match=said):
            import_folder(folder, tmp_path / "out", asked)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is already there"):
        import_folder(folder, tmp_path / "out", ImportOptions(config="debug"))


def test_the_optimizer_comes_along(tmp_path: Path) -> None:
    run = hf_cases.make_run(tmp_path / "run", hf_cases.random_model(SMALL, 0), moments=True)
    asked = ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path), with_optimizer=True, shard_gb=1e-5)
    assert export(run, tmp_path / "hf", asked)["dtype"] == "fp32"
    told = import_folder(tmp_path / "hf", tmp_path / "back", ImportOptions())
    assert told["step"] == 7 and told["optimizer"]
    before = open_checkpoint(run / "checkpoints" / "step-00000007").manifest
    saved = open_checkpoint(tmp_path / "back" / "checkpoints" / "step-00000007")
    origin = {"folder": "hf", "model_type": "deepseek_v3", "optimizer": True}
    extras = {key: value for key, value in before.items() if key not in ("files", "tensors")}
    assert {key: saved.manifest[key] for key in extras} == extras and saved.manifest["imported"] == origin
    first = CheckpointReader(open_checkpoint(run / "checkpoints" / "step-00000007"))
    second = CheckpointReader(saved)
    for name, entry in before["tensors"].items():
        for kind in entry["runs"]:
            n = torch.Size(entry["shape"]).numel()
            assert torch.equal(first.read(name, kind, 0, n), second.read(name, kind, 0, n)), (name, kind)
    assert read(str(tmp_path / "back" / "config.toml"), [], []) == read(str(run / "config.toml"), [], [])


def test_moments_of_other_weights_are_refused(tmp_path: Path) -> None:
    model = hf_cases.random_model(replace(SMALL, num_nextn_predict_layers=0), 0)
    run = hf_cases.make_run(tmp_path / "run", model, moments=True)
    asked = ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path), with_optimizer=True)
    export(run, tmp_path / "hf", asked)
    victim = next((tmp_path / "hf").glob("model-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x11")
    with pytest.raises(ConfigError, match=f"{victim.name} is not the one that was exported"):
        import_folder(tmp_path / "hf", tmp_path / "back", ImportOptions())
    config = str(hf_cases.training_config(tmp_path))
    told = import_folder(tmp_path / "hf", tmp_path / "back", ImportOptions(config=config, weights_only=True))
    assert told["step"] == 0 and not told["optimizer"]


def test_names_drawn_together() -> None:
    assert gathered(["a.1.b.0.c", "a.1.b.1.c", "a.2.b.0.c", "norm.weight"]) == ["a.{1-2}.b.{0-1}.c (3)", "norm.weight"]
    assert gathered([f"a.{n}.b" for n in range(0, 40, 2)]) == ["a.{0,2,4,6,8,10,12,14,...}.b (20)"]
