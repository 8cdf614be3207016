"""The tokenizer that a run keeps, and the doors where another is refused: import, training, generation, export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.pack import pack
from data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from launch import preflight
from launch.config import ConfigError
from launch.hf_export import ExportOptions, export
from launch.hf_import import ImportOptions, import_folder
from launch.hf_tokenizer import tokenizer_files
from launch.load import load_run
from launch.run_tokenizer import (
    data_tokenizer,
    identity,
    keep_for_training,
    kept_tokenizer,
    read_published,
    same_ids,
    training_problems,
)
from model.config import ModelConfig
from model.hf_config import to_hf
from model.hf_names import hf_tensors
from tests.unit import hf_cases

TEXTS = [f"def f{i}(x):\n    return x * {i} + len('abc') - {i * 7}\n" for i in range(60)]
MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=0, num_attention_heads=2,
    intermediate_size=32, moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64,
)  # fmt: skip
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}[EOS]{% endfor %}"


def corpus(folder: Path) -> Path:
    (folder / "texts").mkdir(exist_ok=True)
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number}.txt").write_text(text)
    return folder / "texts"


def published(folder: Path) -> Path:
    """A folder with a tokenizer that ends texts with [EOS], a chat template and generation settings of its own."""
    tensors = hf_cases.logical(hf_cases.random_model(MODEL, 0))
    named = {
        one.name: tensors[one.source].reshape(-1)[one.start : one.start + one.numel].reshape(one.shape).clone()
        for one in hf_tensors(MODEL)
    }
    table = to_hf(MODEL, dtype="float32", bos_token_id=1, eos_token_id=0) | {"eos_token_id": [0, 7]}
    hf_cases.write_folder(folder, table, named)
    content = json.loads(train_bpe(TEXTS, 280).to_json())
    end = content["added_tokens"][0]
    content["model"]["vocab"]["[EOS]"] = content["model"]["vocab"].pop(end["content"])
    end["content"] = "[EOS]"
    content["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    files: dict[str, Any] = {
        "tokenizer.json": json.dumps(content, indent=1),
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "[EOS]"}, "kept": "as it is"}),
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": json.dumps({"eos_token_id": [0, 7], "temperature": 0.6}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: the folder. own: data of its tokenizer. other: data of another one."""
    place = tmp_path_factory.mktemp("tokenizers")
    published(place / "hf")
    texts = corpus(place)
    # Packing is told the end token by the tokenizer's own name for it, as a file with a known name would.
    known = json.loads((place / "hf" / "tokenizer.json").read_text().replace("[EOS]", "</s>"))
    (place / "known.json").write_text(json.dumps(known))
    pack([str(texts)], place / "other", tokenizer="bytes", shard_mb=1)
    pack([str(texts)], place / "own", tokenizer=str(place / "known.json"), shard_mb=1)
    for file in ("hf", "hf-known"):
        (place / file).mkdir(exist_ok=True)
    for path in (place / "hf").iterdir():
        text = path.read_bytes()
        if path.name.startswith("tokenizer"):
            text = text.replace(b"[EOS]", b"</s>")
        (place / "hf-known" / path.name).write_bytes(text)
    return place


def settings(place: Path, data: str) -> str:
    path = place / f"{data}.toml"
    path.write_text(
        f'[data]\npath = "{place / data}"\nseq_len = 16\n[train]\nsteps = 2\nglobal_batch_size = 2\n'
        'micro_batch_size = 2\nprecision = "fp32"\n[cluster]\nworkers = 1\n'
    )
    return str(path)


def bring(place: Path, out: Path, data: str = "own", **more: Any) -> dict[str, Any]:
    return import_folder(place / "hf-known", out, ImportOptions(config=settings(place, data), **more))


def test_what_came_is_kept_used_and_given_back(place: Path, tmp_path: Path) -> None:
    told = bring(place, tmp_path / "run")
    assert told["notes"] == []
    kept = kept_tokenizer(tmp_path / "run")
    assert kept is not None and kept.imported and kept.tokenizer.eod_id == 0
    out = tmp_path / "out"
    export(tmp_path / "run", out, ExportOptions(dtype="fp32"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (place / "hf-known" / name).read_bytes(), name
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [0, 7], None)
    assert not (out / "special_tokens_map.json").exists()  # what the folder did not have is not invented


def test_the_end_token_is_the_folders_word(place: Path, tmp_path: Path) -> None:
    tokenizer = read_published(place / "hf")
    assert tokenizer is not None and tokenizer.eod_id == 0  # "[EOS]" is none of the known names
    told = import_folder(place / "hf", tmp_path / "run", ImportOptions(config=settings(place, "gone")))
    assert "the data is not there yet" in told["notes"][0] and "tokenizer/tokenizer.json" in told["notes"][0]
    loaded = load_run(tmp_path / "run")  # generation without the data
    assert loaded.dataset is None and "gone" in loaded.no_data
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(TEXTS[3])) == TEXTS[3]


def test_import_refuses_the_data_of_another_tokenizer(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        bring(place, tmp_path / "run", "other")
    (problem,) = refused.value.problems
    assert "data.path" in problem and "has another tokenizer (bytes, vocabulary 257" in problem
    assert "--other-tokenizer" in problem and not (tmp_path / "run").exists()
    told = bring(place, tmp_path / "run", "other", other_tokenizer=True)
    assert "left behind" in told["notes"][0] and kept_tokenizer(tmp_path / "run") is None
    assert load_run(tmp_path / "run").tokenizer.spec == "bytes"


def checked(place: Path, run: Path, data: str, *accepted: str) -> Any:
    assignments = [f"data.path={place / data}"]
    return preflight.check(
        str(run / "config.toml"), assignments, run=str(run), launcher="debug", resume="must", accepted=list(accepted)
    )


def test_training_refuses_the_data_of_another_tokenizer(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bring(place, run)
    assert checked(place, run, "own").config.data.path == str(place / "own")
    with pytest.raises(ConfigError, match=r"has another tokenizer .* --accept-change tokenizer"):
        checked(place, run, "other")
    plan = checked(place, run, "other", "tokenizer")
    assert kept_tokenizer(run).imported
    told = keep_for_training(run, plan.config.data, plan.accepted)
    assert told is not None and "gave way to the data's bytes" in told
    assert kept_tokenizer(run).tokenizer.spec == "bytes" and not kept_tokenizer(run).imported
    assert not training_problems(run, plan.config.data, "", ())
    bring(place, tmp_path / "second")
    (problem,) = training_problems(tmp_path / "second", plan.config.data, "python", ())
    assert "would get a tokenizer of its own" in problem


def test_generation_and_export_refuse_the_data_of_another_tokenizer(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "own", place / "moved")
    bring(place, run, "moved")
    shutil.rmtree(place / "moved")
    shutil.copytree(place / "other", place / "moved")  # packed again with another tokenizer
    with pytest.raises(ConfigError, match=r"has another tokenizer .*--tokenizer"):
        load_run(run)
    with pytest.raises(ConfigError, match=r"has another tokenizer .*--tokenizer"):
        export(run, tmp_path / "out", ExportOptions())
    own = run / "tokenizer" / "tokenizer.json"
    assert load_run(run, tokenizer=own).tokenizer.vocab_size == 280
    export(run, tmp_path / "out", ExportOptions(tokenizer=own))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == own.read_bytes()
    wrong = tmp_path / "bytes.json"
    wrong.write_text(ByteTokenizer().to_json())
    with pytest.raises(ConfigError, match="is not the model's own"):
        load_run(run, tokenizer=wrong)


def test_documents_that_end_otherwise_than_the_models_texts_are_said(place: Path, tmp_path: Path) -> None:
    known = place / "hf-known" / "tokenizer.json"
    pack([str(place / "texts")], tmp_path / "ends", tokenizer=str(known), shard_mb=1, end_token="~")
    config = preflight.read(settings(place, "own"), [f"data.path={tmp_path / 'ends'}"], [])
    number = load_tokenizer(known).encode("~")[0]
    assert data_tokenizer(config.data).eod_id == number
    told = bring(place, tmp_path / "run", assignments=(f"data.path={tmp_path / 'ends'}",))
    assert told["notes"] == [
        f"documents of the data end with token {number}, the model's own texts with token 0 (eos_token of its "
        "tokenizer_config.json)"
    ]
    run = hf_cases.make_run(tmp_path / "native", hf_cases.random_model(MODEL, 0))
    assert keep_for_training(run, config.data, ()) is None
    assert kept_tokenizer(run).tokenizer.eod_id == number  # as its documents ended


def test_a_prompt_begins_as_the_imported_model_knows_it(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bring(place, run)
    assert load_run(run).begin == ()  # its post-processor adds nothing
    settings = run / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": {"content": "x"}, "add_bos_token": True}))
    assert load_run(run).begin == (load_run(run).tokenizer.encode("x")[0],)
    settings.write_text(json.dumps({"bos_token": "x", "add_bos_token": False}))
    assert load_run(run).begin == ()
    shutil.rmtree(run / "tokenizer")
    assert load_run(run).begin == (0,)  # as packing begins a document


def test_a_run_keeps_the_tokenizer_that_it_was_started_on(place: Path, tmp_path: Path) -> None:
    run = hf_cases.make_run(tmp_path / "run", hf_cases.random_model(MODEL, 0))
    data = preflight.read(settings(place, "other"), [], []).data
    assert keep_for_training(run, data, ()) is None and kept_tokenizer(run).tokenizer.spec == "bytes"
    assert keep_for_training(run, data, ()) is None
    assert not training_problems(run, data, "", ())
    other = preflight.read(settings(place, "own"), [], []).data
    (problem,) = training_problems(run, other, "", ())
    assert "has another tokenizer" in problem
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "is not the file that the run was made with" in training_problems(run, data, "", ())[0]


def test_one_tokenizer_in_different_files(place: Path) -> None:
    """What an export or save_pretrained changes in the file does not make another tokenizer of it."""
    own = data_tokenizer(preflight.read(settings(place, "own"), [], []).data)
    content = json.loads(own.to_json())
    content["post_processor"] = None
    content["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (place / "again.json").write_text(json.dumps(content, indent=4))
    again = load_tokenizer(place / "again.json")
    assert again.fingerprint != own.fingerprint and same_ids(own, again)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (place / "fewer.json").write_text(json.dumps(content))
    assert not same_ids(own, load_tokenizer(place / "fewer.json"))
    exported = place / "bytes-exported.json"
    exported.write_text(tokenizer_files(ByteTokenizer(), 64)["tokenizer.json"])
    assert identity(load_tokenizer(exported)) == identity(ByteTokenizer())


def test_a_folder_without_tokenizer_json_says_what_it_has(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in (place / "hf").iterdir():
        if not path.name.startswith("tokenizer"):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tiktoken.model").write_text("IQ== 0\n")
    told = import_folder(folder, tmp_path / "run", ImportOptions(config=settings(place, "own")))
    assert "no tokenizer.json (tiktoken.model cannot be read)" in told["notes"][0]
