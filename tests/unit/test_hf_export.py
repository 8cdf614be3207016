"""A run as a Hugging Face folder: the files, the tokenizer, the numbers, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.tokenizer import ByteTokenizer, load_tokenizer
from launch.config import ConfigError
from launch.hf_export import ExportOptions, export
from launch.hf_tokenizer import CHAT_TEMPLATE, tokenizer_files
from parallel.checkpoint import CheckpointError
from parallel.safetensors_file import SafetensorsReader
from tests.unit import hf_cases


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = replace(hf_cases.random_config(3, "v3"), num_hidden_layers=2, first_k_dense_replace=1,
                     num_nextn_predict_layers=1)  # fmt: skip
    return hf_cases.make_run(tmp_path / "run", hf_cases.random_model(config, 3))


def options(run: Path, **more) -> ExportOptions:
    return ExportOptions(tokenizer=hf_cases.bytes_tokenizer(run.parent), **more)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        reader = SafetensorsReader(folder / file)
        for name, entry in reader.entries.items():
            assert index["weight_map"][name] == file
            found[name] = reader.flat_slice(name, 0, torch.Size(entry["shape"]).numel()).view(entry["shape"])
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(one.numel() * one.element_size() for one in found.values())
    return found


def test_every_file_and_every_number(run: Path, tmp_path: Path) -> None:
    told = export(run, tmp_path / "hf", options(run, dtype="bf16", shard_gb=2e-5))
    assert told["files"] > 1 and told["step"] == 7
    names = {path.name for path in (tmp_path / "hf").iterdir() if "safetensors" not in path.name}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                     "special_tokens_map.json", "chat_template.jinja", "README.md"}  # fmt: skip
    model = hf_cases.random_model(hf_cases.model_config_of(run), 3)
    ours, theirs = hf_cases.logical(model), tensors_of(tmp_path / "hf")
    layer = "layers.1.mlp"
    both = ours[f"{layer}.experts.1.gate_up_proj"].to(torch.bfloat16)
    width = len(both) // 2
    assert torch.equal(theirs[f"model.{layer}.experts.1.gate_proj.weight"], both[:width])
    assert torch.equal(theirs[f"model.{layer}.experts.1.up_proj.weight"], both[width:])
    bias = theirs[f"model.{layer}.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, ours[f"{layer}.gate.e_score_correction_bias"])
    assert torch.equal(theirs["model.layers.2.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(theirs["model.layers.2.shared_head.head.weight"], theirs["lm_head.weight"])
    assert torch.equal(theirs["model.layers.2.shared_head.norm.weight"], ours["mtp.0.norm.weight"].to(torch.bfloat16))
    first = min(path for path in (tmp_path / "hf").glob("*.safetensors"))
    header = first.read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header  # transformers 4 asks for it
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no draft is left


def test_the_card_tells_the_run(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "hf", options(run))
    card = (tmp_path / "hf" / "README.md").read_text()
    for said in ("7 steps, 1,234 tokens", "2 rank(s), expert parallelism 1, ZeRO stage 1", "bytes; ", "fp32, ",
                 r'r"model\.layers\.(2)\..*"', "Not at hand"):  # fmt: skip
        assert said in card, said


def test_the_bytes_tokenizer_is_the_same_in_the_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ours = ByteTokenizer()
    theirs = Tokenizer.from_str(tokenizer_files(ours, 128)["tokenizer.json"])
    assert theirs.get_vocab_size() == 257
    every = bytes(range(128)).decode() + "é ß 漢字 🙂 \r\n\t  def f(x):\n    return x  "
    for text in ("", "a", every, every[::-1] * 50):
        assert theirs.encode(text).ids == [256, *ours.encode(text).tolist()]
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text


def test_a_trained_tokenizer_only_begins_with_the_end_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from data.tokenizer import train_bpe

    ours = train_bpe(["def f(x):\n    return x + 12345\n" * 20], 300)
    (tmp_path / "bpe.json").write_text(ours.to_json())
    files = tokenizer_files(load_tokenizer(tmp_path / "bpe.json"), 128)
    theirs, text = Tokenizer.from_str(files["tokenizer.json"]), "def g(y):\n    return y\n"
    assert theirs.encode(text).ids == [ours.eod_id, *ours.encode(text).tolist()]
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["bos_token"] == settings["eos_token"] == settings["pad_token"] == "<|endoftext|>"
    assert settings["chat_template"] == files["chat_template.jinja"] == CHAT_TEMPLATE


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is already there") as refused:
        export(run, tmp_path / "there", options(run, step=3, with_optimizer=True, dtype="bf16"))
    assert [said for said in ("steps 7", "needs --dtype fp32", "weights only") if said not in str(refused.value)] == []
    with pytest.raises(ConfigError, match="is not a run"):
        export(tmp_path, tmp_path / "hf", options(run))
    odd = replace(hf_cases.model_config_of(run), rms_norm_eps=1e-5)
    other = hf_cases.make_run(tmp_path / "odd", hf_cases.random_model(odd, 1))
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        export(other, tmp_path / "hf", options(run))
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_leaves_nothing(run: Path, tmp_path: Path) -> None:
    victim = max((run / "checkpoints" / "step-00000007").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=victim.name):
        export(run, tmp_path / "hf", options(run))
    assert not (tmp_path / "hf").exists() and not (tmp_path / ".hf.draft").exists()


def test_a_disk_that_refuses_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import hf_export

    real, calls = hf_export.write_entries, []

    def full(path: Path, *rest, **named):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path, *rest, **named)

    monkeypatch.setattr(hf_export, "write_entries", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "hf", options(run, shard_gb=1e-5))
    assert not (tmp_path / "hf").exists() and not (tmp_path / ".hf.draft").exists()
