"""What an export gives its readers: a chat template, a known tokenizer as it came, no prediction layers, notes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import DEEPSEEK, ByteTokenizer, deepseek_file, load_tokenizer, train_bpe
from launch.config import ConfigError, read
from launch.hf_export import ExportOptions, export
from launch.hf_readers import reader_notes
from launch.hf_tokenizer import tokenizer_files
from model.config import YarnConfig
from tests.unit import hf_cases

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"},
]  # fmt: skip


def rendered(template: str, end: str, **more: Any) -> tuple[str, list[str]]:
    """The text, and what lies between the generation marks; the mark is transformers' own addition to Jinja."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            said.append(caller())
            return said[-1]

    said: list[str] = []
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    text = environment.from_string(template).render(
        messages=CONVERSATION, bos_token=end, eos_token=end, add_generation_prompt=False, **more
    )
    return text, said


def test_an_assistant_ends_its_turn_and_only_its_words_are_marked() -> None:
    files = tokenizer_files(ByteTokenizer(), 64)
    text, said = rendered(files["chat_template.jinja"], "<|endoftext|>")
    assert text == (
        "system: Be brief.\n\nuser: hi\n\nassistant: yes<|endoftext|>user: and?\n\nassistant: no<|endoftext|>"
    )
    assert said == [" yes<|endoftext|>", " no<|endoftext|>"]
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == files["chat_template.jinja"]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "deepseek"])
def test_a_conversation_begins_once(kind: str) -> None:
    """As text and tokenised afterwards, with what the tokenizer itself adds: one begin token, not two and not none."""
    from tokenizers import Tokenizer

    tokenizer = {
        "bytes": ByteTokenizer, "bpe": lambda: train_bpe(["def f(x): return x"] * 9, 270),
        "deepseek": lambda: load_tokenizer(deepseek_file(), DEEPSEEK),
    }[kind]()  # fmt: skip
    files = tokenizer_files(tokenizer, 64)
    settings = json.loads(files["tokenizer_config.json"])
    text, _ = rendered(files["chat_template.jinja"], settings["bos_token"])
    ids = Tokenizer.from_str(files["tokenizer.json"]).encode(text).ids
    assert ids[0] == tokenizer.eod_id and ids[1] != tokenizer.eod_id


def test_deepseeks_tokenizer_goes_out_as_it_came() -> None:
    """llama.cpp's converter knows a tokenizer by the ids of one text, special tokens that it adds included."""
    from tokenizers import Tokenizer

    files = tokenizer_files(load_tokenizer(deepseek_file(), DEEPSEEK), 64)
    assert files["tokenizer.json"].encode() == deepseek_file().read_bytes()
    text = "\n \n\n \t\t \n    🚀 (normal) 3 33 3333 33333333 នៅ ÄËÏ 我想在 ------======= I've been 'told he's"
    ids = Tokenizer.from_str(files["tokenizer.json"]).encode(text).ids
    assert ids == Tokenizer.from_file(str(deepseek_file())).encode(text).ids and ids[0] != 1
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["add_bos_token"] is True and settings["bos_token"] == "<｜end▁of▁sentence｜>"


def test_export_without_prediction_layers(tmp_path: Path) -> None:
    config = replace(hf_cases.random_config(3, "v3"), num_nextn_predict_layers=2)
    run = hf_cases.make_run(tmp_path / "run", hf_cases.random_model(config, 1), moments=True)
    asked = ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path), prediction_layers=False, dtype="fp32")
    export(run, tmp_path / "hf", asked)
    names = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(f"layers.{config.num_hidden_layers + k}." in name for name in names for k in range(2))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    reader = hf_cases.bring_in(tmp_path / "hf", tmp_path)
    assert hf_cases.model_config_of(tmp_path / "imported") == replace(config, num_nextn_predict_layers=0)
    assert reader.read("norm.weight", "weight", 0, config.hidden_size).any()
    with pytest.raises(ConfigError, match="leave out --without-prediction-layers"):
        export(run, tmp_path / "both", replace(asked, with_optimizer=True))


def test_positions_beyond_yarns_reach_are_cut_and_said(tmp_path: Path) -> None:
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=16)
    config = replace(hf_cases.random_config(3, "v3"), max_position_embeddings=128, rope_scaling=yarn)
    run = hf_cases.make_run(tmp_path / "run", hf_cases.random_model(config, 1), moments=True)
    asked = ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path), dtype="fp32")
    told = export(run, tmp_path / "hf", asked)
    assert "128 exceeds" in told["notes"][0] and "= 4 * 16 = 64" in told["notes"][0]
    for file, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        assert json.loads((tmp_path / "hf" / file).read_text())[key] == 64
    with pytest.raises(ConfigError, match="--with-optimizer keeps the model as it is"):
        export(run, tmp_path / "more", replace(asked, with_optimizer=True))


def test_what_single_readers_cannot_do_is_said(tmp_path: Path) -> None:
    v3, v2 = read("v3-671b", [], []).model, read("v2-lite", [], []).model
    deepseek = load_tokenizer(deepseek_file())  # as a given file: known by its content
    yarn = replace(v3, rope_scaling=replace(v3.rope_scaling, mscale=1.0, mscale_all_dim=0.0))
    grouped = replace(v2, topk_method="group_limited_greedy", n_group=8, topk_group=3, rope_scaling=None)
    full = replace(v3, q_lora_rank=None)
    for model, tokenizer, wanted in (
        (v3, deepseek, []),
        (
            v2,
            deepseek,
            ["mscale_all_dim = 0.707 out of deepseek_v2's attention"],
        ),
        (yarn, deepseek, ["mscale = 1.0 and mscale_all_dim = 0.0"]),
        (grouped, deepseek, ["n_group = 8, topk_group = 3", "5.3.0 fails"]),
        (full, deepseek, ["q_lora_rank = null is read for 26, 27, 48 layers only, and this model has 61"]),
        (replace(v3, kv_lora_rank=192, qk_rope_head_dim=32), deepseek, ["192 + 32 = 224"]),
        (replace(v3, rms_norm_eps=1e-5, latent_norm_eps=1e-6), deepseek, ["rms_norm_eps = 1e-05"]),
        (v3, ByteTokenizer(), ["without merges"]),
        (v3, train_bpe(["def f(x): return x"] * 9, 270), ["get_vocab_base_pre"]),
    ):
        notes = reader_notes(model, tokenizer)
        assert len(notes) == len(wanted), notes
        assert all(any(said in note for note in notes) for said in wanted), notes
    assert not reader_notes(read("laptop", [], []).model, deepseek)  # the preset that people serve on their own machine
    run = hf_cases.make_run(tmp_path / "run", hf_cases.random_model(hf_cases.random_config(3, "v3"), 1))
    told = export(run, tmp_path / "hf", ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path)))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert told["notes"] and all(note in card for note in told["notes"])
