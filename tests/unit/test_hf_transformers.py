"""Beside transformers itself: the same logits, the same gradients, in both directions, for random configurations.

transformers is no requirement of the project (`pip install transformers`, or the extra `hf`); without it these tests
are skipped, and test_hf_names.py, test_hf_export.py and test_hf_import.py hold names, shapes, fields and refusals.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.hf_export import ExportOptions, export
from model.config import ModelConfig, YarnConfig
from model.hf_config import to_hf
from model.transformer import Transformer
from tests.unit import hf_cases

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

CASES = [(kind, seed) for kind in ("v3", "v2") for seed in range(11)]
NAMES = [f"{kind}-{seed}" for kind, seed in CASES]


@pytest.fixture(autouse=True)
def quiet():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prompts(config: ModelConfig, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))


def theirs_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    # eager: a loop over experts; the grouped product of the default wants rows of a multiple of 16 bytes
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )


def assert_same(ours: Transformer, theirs: Any, tokens: Tensor, record: Any) -> None:
    """Logits, loss and every gradient; the greatest differences go into the test's record."""
    ours.train()
    theirs.train()
    logits = ours(tokens).logits
    their_logits = theirs(tokens).logits
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=1e-5)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs(tokens, labels=tokens).loss.backward()
    grads = {name if name.startswith("lm_head") else f"model.{name}": p.grad for name, p in ours.named_parameters()}
    worst = 0.0
    for name, parameter in theirs.named_parameters():
        ours_grad = grads.pop(name)
        if parameter.grad is None or ours_grad is None:  # experts that no token chose
            given = parameter.grad if ours_grad is None else ours_grad
            assert given is None or not given.any(), name
            continue
        torch.testing.assert_close(ours_grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)
        worst = max(worst, float((ours_grad - parameter.grad).abs().max()))
    assert all(name.startswith("model.mtp.") for name in grads), "parameters that transformers does not have"
    record("logits", float((logits - their_logits).abs().max().detach()))
    record("gradients", worst)


@pytest.mark.parametrize(("kind", "seed"), CASES, ids=NAMES)
def test_ours_in_transformers(kind: str, seed: int, tmp_path: Path, record_property) -> None:
    config = hf_cases.random_config(seed, kind)
    if CASES.index((kind, seed)) % 11 == 10:  # DeepseekV2 knows no prediction layers, and leaves them alone
        config = replace(config, num_nextn_predict_layers=1)
    ours = hf_cases.random_model(config, seed)
    run = hf_cases.make_run(tmp_path / "run", ours)
    export(run, tmp_path / "hf", ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path), shard_gb=1e-5))
    theirs, info = theirs_of(tmp_path / "hf")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    first = config.num_hidden_layers
    assert all(int(name.split(".")[2]) >= first for name in info["unexpected_keys"]), info["unexpected_keys"]
    assert type(theirs).__name__ == f"Deepseek{kind.upper()}ForCausalLM"
    assert_same(ours, theirs, prompts(config, seed), record_property)


@pytest.mark.parametrize(("kind", "seed"), CASES, ids=NAMES)
def test_theirs_in_ours(kind: str, seed: int, tmp_path: Path, record_property) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = hf_cases.random_config(seed + 100, kind)
    table = to_hf(wanted, dtype="float32", bos_token_id=0, eos_token_id=0)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text(json.dumps(table))
    torch.manual_seed(seed)
    made = AutoConfig.from_pretrained(tmp_path / "made")
    theirs = AutoModelForCausalLM.from_config(made, experts_implementation="eager").float()
    for name, values in (*theirs.named_parameters(), *theirs.named_buffers()):
        if "layernorm" in name or name.endswith("norm.weight"):
            values.data.uniform_(0.5, 1.5)
        if name.endswith("e_score_correction_bias"):
            values.data.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    reader = hf_cases.bring_in(tmp_path / "hf", tmp_path)
    config = hf_cases.model_config_of(tmp_path / "imported")
    assert config.num_nextn_predict_layers == 0  # transformers does not keep them
    assert_same(hf_cases.load_model(reader, config), theirs, prompts(config, seed), record_property)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite", "kimi_k2"])
def test_published_shapes_of_others(kind: str, tmp_path: Path, record_property) -> None:
    """Fields that are missing, an epsilon of the latents' own, YaRN with equal betas: as transformers computes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=64, beta_fast=1.0, beta_slow=1.0)
    base = replace(
        hf_cases.random_config(103, "v3"), hidden_size=32, num_attention_heads=2, num_hidden_layers=2, n_group=8,
        topk_group=4, n_routed_experts=16, num_experts_per_tok=3, first_k_dense_replace=1, num_nextn_predict_layers=0,
        rope_scaling=yarn if kind == "kimi_k2" else None, rms_norm_eps=1e-5 if kind == "glm4_moe_lite" else 1e-6,
    )  # fmt: skip
    table = to_hf(base, dtype="float32", bos_token_id=0, eos_token_id=0)
    for name in ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps"):
        del table[name]
    table["model_type"] = "deepseek_v3" if kind == "kimi_k2" else kind  # transformers knows Kimi-K2 under no other name
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text(json.dumps(table))
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(tmp_path / "made")
    theirs = AutoModelForCausalLM.from_config(made, experts_implementation="eager").float()
    for name, values in (*theirs.named_parameters(), *theirs.named_buffers()):
        if "layernorm" in name or name.endswith("norm.weight"):
            values.data.uniform_(0.5, 1.5)
        elif name.endswith("e_score_correction_bias"):
            values.data.normal_(0, 0.2)
        elif "kv_a_proj" in name or "q_a_proj" in name or "embed" in name:
            values.data.mul_(0.02)  # latents so small that the epsilon counts
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**table, "model_type": kind}))
    reader = hf_cases.bring_in(tmp_path / "hf", tmp_path)
    config = hf_cases.model_config_of(tmp_path / "imported")
    assert_same(hf_cases.load_model(reader, config), theirs, prompts(config, 0), record_property)


def test_the_tokenizer_and_greedy_text_with_and_without_prediction_layers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = replace(hf_cases.random_config(3, "v3"), num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=257)
    ours = hf_cases.random_model(config, 0)
    run = hf_cases.make_run(tmp_path / "run", ours)
    export(run, tmp_path / "hf", ExportOptions(tokenizer=hf_cases.bytes_tokenizer(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("def f(é):\n", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[256, *"def f(é):\n".encode()]]
    assert tokenizer.decode(prompt.input_ids[0], skip_special_tokens=True) == "def f(é):\n"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\n\nassistant:" and tokenizer(chat).input_ids[:2] == [256, ord("u")]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 2
    told = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, truncation=False
    )
    marked = [token for token, said in zip(told["input_ids"], told["assistant_masks"], strict=True) if said]
    assert marked == [*b" yes", 256, *b" yes", 256]

    theirs, _ = theirs_of(tmp_path / "hf")
    text = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    wanted = prompt.input_ids
    with torch.no_grad():
        while wanted.shape[1] < len(text):
            wanted = torch.cat([wanted, ours(wanted).logits[:, -1:].argmax(-1)], 1)
    assert wanted[0].tolist() == text
    with pytest.raises(RuntimeError, match="MtpModel weights are missing"):  # the trap that the card speaks of
        theirs.generate(**prompt, max_new_tokens=12, do_sample=False, use_mtp=True)
    line = next(line for line in (tmp_path / "hf" / "README.md").read_text().splitlines() if "_keys_to_ignore" in line)
    assert line == r'model._keys_to_ignore_on_load_unexpected = {r"model\.layers\.(2)\..*"}'
    theirs._keys_to_ignore_on_load_unexpected = {r"model\.layers\.(2)\..*"}
    drafted = theirs.generate(**prompt, max_new_tokens=12, do_sample=False, use_mtp=True)
    assert drafted[0].tolist() == text
