"""The adapter under lm-evaluation-harness itself, on task files made here; skipped where it is not installed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data.tokenizer import ByteTokenizer
from launch.config import ConfigError
from launch.harness import run_tasks
from launch.scoring import Pair, score
from model.config import ModelConfig
from model.exchange import LocalExchange
from model.init import init_weights
from model.transformer import Transformer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
WINDOW = 32
CHOICES = [("the cat", [" sat", " zzz"]), ("a dog", [" ran", " qqq", " jump"]), ("one two", [" three", " 3"])]


def build() -> Transformer:
    config = ModelConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_nextn_predict_layers=0, num_attention_heads=2,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        initializer_range=0.5,
    )  # fmt: skip
    model = Transformer(config, LocalExchange())
    init_weights(model, seed=1)
    return model.eval()


def says(
    prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    assert (stop, max_new_tokens, temperature) == (["."], 8, 0.0)
    return [{"the cat": "sat"}.get(prompt, "nothing") for prompt in prompts]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"q": q, "choices": choices, "gold": 0, "want": choices[0].strip()} for q, choices in CHOICES]
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choose.yaml").write_text(
        f"task: own_choose\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "write.yaml").write_text(
        f"task: own_write\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: want\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list:\n  - metric: exact_match\n"
    )
    (folder / "roll.yaml").write_text(
        f"task: own_roll\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{q}} {{want}} {{q}} {{want}} {{q}} {{want}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    return folder


def test_the_harness_finds_what_the_model_says(tasks: Path) -> None:
    model, tokenizer = build(), ByteTokenizer()
    names = ["own_choose", "own_write", "own_roll"]
    found = run_tasks(model, tokenizer, says, names, tasks, window=WINDOW)

    right = 0
    for question, choices in CHOICES:
        context = [tokenizer.eod_id, *tokenizer.encode(question).tolist()]
        scores = score(model, [Pair(context, tokenizer.encode(choice).tolist()) for choice in choices], WINDOW)
        right += max(range(len(choices)), key=lambda i: scores[i].log_probability) == 0
    assert found["own_choose"]["acc"] == pytest.approx(right / 3)
    assert found["own_write"]["exact_match"] == pytest.approx(1 / 3)

    nats = n_bytes = 0.0
    for question, choices in CHOICES:
        text = " ".join([question, choices[0].strip()] * 3)
        ids = torch.tensor([tokenizer.eod_id, *tokenizer.encode(text).tolist()])
        n_bytes += len(text)
        with torch.no_grad():
            if len(ids) - 1 <= WINDOW:
                nats += float(model(ids[None, :-1], None, ids[None, 1:]).token_losses.sum())
            else:  # the last window is moved back so that it is full, and only its new tokens count
                first = model(ids[None, :WINDOW], None, ids[None, 1 : WINDOW + 1]).token_losses
                rest = len(ids) - 1 - WINDOW
                last = model(ids[None, -WINDOW - 1 : -1], None, ids[None, -WINDOW:]).token_losses
                nats += float(first.sum() + last[:, -rest:].sum())
    assert found["own_roll"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_unknown_tasks_and_folders_are_named(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"own_nothing is not known; known are .*own_choose"):
        run_tasks(build(), ByteTokenizer(), says, ["own_nothing"], tasks, window=WINDOW)
    with pytest.raises(ConfigError, match="not a folder"):
        run_tasks(build(), ByteTokenizer(), says, ["own_choose"], tasks / "choose.yaml", window=WINDOW)
