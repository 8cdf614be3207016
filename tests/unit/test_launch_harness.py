"""The adapter under lm-evaluation-harness itself, on task files made here; skipped where it is not installed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data.tokenizer import ByteTokenizer
from launch.config import ConfigError
from launch.generation_wishes import Wish, wish_of
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
    prompts: Sequence[str], *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int,
    top_k: int = 0, top_p: float = 1.0,
) -> list[str]:  # fmt: skip
    assert (stop, max_new_tokens, temperature, top_k, top_p) == (["."], 8, 0.0, 0, 1.0)
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


@pytest.mark.parametrize(
    ("given", "wish"),
    [
        ({}, Wish((), 256, 0.0)),
        ({"until": None, "max_gen_toks": None, "temperature": None, "do_sample": None}, Wish((), 256, 0.0)),
        ({"until": "\n", "max_new_tokens": 150}, Wish(("\n",), 150, 0.0)),
        ({"until": ["a", ""], "max_tokens": 3, "max_gen_toks": 3}, Wish(("a",), 3, 0.0)),
        ({"max_completion_tokens": 7, "num_beams": 1, "repetition_penalty": 1.0}, Wish((), 7, 0.0)),
        ({"max_length": 100}, Wish((), 90, 0.0)),
        ({"do_sample": True, "top_p": 0.9, "top_k": 40}, Wish((), 256, 1.0, 40, 0.9)),
        ({"temperature": 0.7, "top_k": -1}, Wish((), 256, 0.7)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.95}, Wish((), 256, 0.0, 0, 0.95)),
    ],
)
def test_a_wish_is_read_as_the_harness_reads_it(given: dict, wish: Wish) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    assert wish_of(given, normalize_gen_kwargs, prompt_tokens=10) == wish


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 4, "seed": 3}, "num_beams = 4 is not honoured; seed = 3 is not honoured"),
        ({"max_tokens": 3, "max_gen_toks": 4}, "max_gen_toks = 4 and max_tokens = 3 contradict each other"),
        ({"until": 5}, "until = 5 is neither a text nor a list of texts"),
        ({"until": ["a", 5]}, "neither a text"),
        ({"max_gen_toks": "many"}, "max_gen_toks = 'many' is not a number"),
        ({"max_gen_toks": 0}, "0 new tokens are asked for"),
        ({"max_length": 8}, "-2 new tokens are asked for"),
        ({"do_sample": True, "temperature": 0.0}, "contradict each other"),
        ({"temperature": -1.0, "do_sample": True}, "temperature = -1.0 is negative"),
        ({"top_p": 0.0}, "top_p = 0.0 is not above 0"),
        ({"do_sample": "yes"}, "do_sample = 'yes' is neither true nor false"),
    ],
)
def test_a_wish_that_is_not_honoured_is_named(given: dict, said: str) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    with pytest.raises(ValueError) as refused:
        wish_of(given, normalize_gen_kwargs, prompt_tokens=10)
    assert said in str(refused.value)


def test_tasks_that_cannot_be_run_are_refused_with_task_and_document(tasks: Path) -> None:
    def change(file: str, name: str, *pairs: tuple[str, str]) -> None:
        text = (tasks / f"{file}.yaml").read_text()
        for old, new in (("task: own_", f"task: {name}_"), *pairs):
            assert old in text
            text = text.replace(old, new)
        (tasks / f"{name}.yaml").write_text(text)

    model, tokenizer = build(), ByteTokenizer()
    change("write", "beams", ("max_gen_toks: 8", "max_gen_toks: 8, num_beams: 4"))
    with pytest.raises(ConfigError, match=r"task beams_write: generation_kwargs: num_beams = 4 is not honoured"):
        run_tasks(model, tokenizer, says, ["own_choose", "beams_write"], tasks, window=WINDOW)
    rows = tasks.parent / "odd.json"
    rows.write_text(
        "".join(
            json.dumps({"q": q, "choices": choices, "gold": 0}) + "\n"
            for q, choices in [("fine", [" a", " b"]), ("empty", [" a", ""]), ("long", ["y" * (WINDOW + 1), " b"])]
        )
    )
    change("choose", "odd", (str(tasks.parent / "rows.json"), str(rows)))
    with pytest.raises(ConfigError) as refused:
        run_tasks(model, tokenizer, says, ["odd_choose"], tasks, window=WINDOW)
    empty, long = refused.value.problems
    assert "task odd_choose, document 1, choice 1: the continuation '' has no token" in empty
    assert "task odd_choose, document 2, choice 0: the continuation 'yyyy" in long and "33 tokens" in long
    first = json.dumps({"q": "x", "choices": [""], "gold": 0}) + "\n"
    rows.write_text(first + rows.read_text())
    (tasks / "odd.yaml").write_text(
        (tasks / "odd.yaml").read_text().replace(str(rows), str(rows.with_suffix(".jsonl")))
    )
    rows.rename(rows.with_suffix(".jsonl"))  # another name: the data library keeps what it has read
    with pytest.raises(ConfigError, match=r"task odd_choose cannot be built from its YAML and data: IndexError"):
        run_tasks(model, tokenizer, says, ["odd_choose"], tasks, window=WINDOW)
    change("write", "null", ("until: ['.'], max_gen_toks: 8", "until: null, max_gen_toks: null"))

    def writes(prompts: Sequence[str], **wish: object) -> list[str]:
        assert (wish["stop"], wish["max_new_tokens"]) == ([], 256)
        return ["sat" for _ in prompts]

    assert run_tasks(model, tokenizer, writes, ["null_write"], tasks, window=WINDOW)["null_write"]["exact_match"] > 0


def test_figures_of_bytes_are_left_out_where_the_tokenizer_loses_some(tasks: Path) -> None:
    assert run_tasks(build(), ByteTokenizer(), says, ["own_roll"], tasks, window=WINDOW, lossy="x")["own_roll"] == {}
