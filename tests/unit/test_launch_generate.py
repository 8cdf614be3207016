"""`trimtab generate` and its benchmark: options refused together, stops and seeds in whole completions, tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from data.tokenizer import ByteTokenizer
from launch import bench_generate
from launch.bench_generate_rank import WAYS
from launch.cli import main
from launch.completions import complete
from launch.generate_commands import Printer
from model.drafts import ModuleDrafts
from model.sampling import Sampling
from tests.unit.literal_model import TINY, build

MACHINE = {"processor": "a processor", "cores": 2, "load": 0.5, "packages": {"torch": "2.13.0", "transformers": None}}


def loaded():
    """What `complete` needs of a run: a model over bytes, its tokenizer, the training's sequence length."""
    net = build(replace(TINY, vocab_size=257)).eval()
    return SimpleNamespace(
        model=net, tokenizer=ByteTokenizer(), config=SimpleNamespace(data=SimpleNamespace(seq_len=32))
    )


def test_all_wrong_options_are_refused_at_once(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"text": 1}\nnot json\n')
    status = main([
        "generate", str(tmp_path), "--temperature", "-1", "--top-k", "-1", "--top-p", "0", "--max-new-tokens", "0",
        "--batch", "0", "--context", "0", "--draft-tokens", "0", "--stop", "", "--speculative", str(tmp_path / "no"),
        "--prompts-file", str(tmp_path / "bad.jsonl"),
    ])  # fmt: skip
    said = capsys.readouterr().err
    assert status == 2
    for text in ("is not a run", "--temperature = -1.0", "--top-k = -1", "--top-p = 0.0", "--max-new-tokens 0",
                 "--batch 0", "--context 0", "--draft-tokens 0", "--stop ''", "neither mtp nor a run's folder",
                 "bad.jsonl, line 2", "bad.jsonl, line 3"):  # fmt: skip
        assert text in said, text
    assert main(["generate", str(tmp_path), "--prompts-file", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: cannot be read" in capsys.readouterr().err


def test_completions_stop_and_repeat_whatever_the_batch():
    run, prompts = loaded(), ["def ", "", "größe", "x"]
    settings = {"max_new_tokens": 24, "seed": 5, "show": None}
    plain = complete(run, prompts, Sampling(1.0), **settings).completions
    assert [one.finished for one in plain] == ["length", "length", "eod", "length"]
    assert [one.new_tokens == 24 for one in plain] == [True, True, False, True]
    for batch in (1, 3):
        assert complete(run, prompts, Sampling(1.0), batch=batch, **settings).completions == plain
    alone = complete(run, prompts[2:3], Sampling(1.0), **{**settings, "seed": 7}).completions
    assert alone == plain[2:3]  # prompt i draws with seed + i
    stop = plain[1].text[9:11]
    shown = dict.fromkeys(range(4), "")

    def show(number, text):
        shown[number] += text

    stopped = complete(run, prompts, Sampling(1.0), stops=[stop], **{**settings, "show": show}).completions
    for number, (whole, cut) in enumerate(zip(plain, stopped, strict=True)):
        assert cut.text == whole.text.split(stop)[0] == shown[number]
        assert cut.finished == ("stop" if stop in whole.text else whole.finished)
    assert stopped[1].new_tokens < 24


def test_drafts_give_the_same_greedy_text_and_figures():
    run = loaded()
    plain = complete(run, ["abc", "d"], Sampling(), max_new_tokens=12)
    drafted = complete(
        run, ["abc", "d"], Sampling(), max_new_tokens=12, drafter=lambda rows: ModuleDrafts(run.model, rows)
    )
    assert drafted.completions == plain.completions
    figures = drafted.figures()
    assert figures["new_tokens"] == 24 and figures["drafted"] > 0 and 0 <= figures["acceptance"] <= 1
    assert plain.figures()["acceptance"] is None
    json.dumps(figures)


def test_several_texts_are_printed_in_order(capsys):
    printer = Printer(["one ", "two "])
    printer.show(1, "b")
    printer.show(0, "a")
    assert capsys.readouterr().out == "one a"
    printer.show(1, "B")
    printer.show(0, "A")
    printer.finish()
    assert capsys.readouterr().out == "A\ntwo bB\n"


def _said(name, seconds, tokens, beside, acceptance=None, forwards=None):
    """One repeat of one way at batch 2 with ours in turns, as bench_generate_rank.measure returns it."""
    record = {"batch": 2, "first": [0.1], "weight_bytes": 2**20}
    ours = {**record, "whole": beside, "tokens": TOKENS, "acceptance": None, "forwards": None}
    its = {**record, "whole": seconds, "tokens": tokens, "acceptance": acceptance, "forwards": forwards}
    return {"trimtab": [ours], name: [its]}


TOKENS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_rows_compare_speed_and_tokens_with_ours():
    found = {
        "trimtab": [_said("trimtab", seconds, TOKENS, seconds) for seconds in ([1.0, 2.0], [3.0, 4.0])],
        "trimtab mtp": [
            _said("trimtab mtp", [1.25], [[1, 2, 3, 4], [5, 6, 0, 0]], [1.0], 0.5, 2),
            _said("trimtab mtp", [12.0], TOKENS, [9.0], 0.5, 2),  # the machine was slow for both
        ],
    }
    ours, drafted = bench_generate.table_rows(found, new_tokens=4)
    assert ours["tokens_per_second"].median == pytest.approx((8 / 2 + 8 / 3) / 2)
    assert ours["tokens_per_second"].repeats == 4 and ours["of_ours"].median == 1.0 and ours["same_tokens"] == 1.0
    assert ours["later_token_ms"] == pytest.approx((2.5 - 0.1) / 3 * 1e3) and ours["first_token_ms"] == 100.0
    assert drafted["same_tokens"] == 0.75 and drafted["tokens_per_forward"] == 2.0
    assert drafted["of_ours"].least == pytest.approx(0.75) and drafted["of_ours"].greatest == pytest.approx(0.8)
    heldout = {bits: {"bits_per_byte": value, "weight_bytes": 2**20, "heldout_bytes": 9}
               for bits, value in (("32", 2.0), ("8", 2.01), ("4", 2.2))}  # fmt: skip
    facts = {
        "weights": "w", "prompt_tokens": 3, "new_tokens": 4, "repeats": 2, "inner": 2, "threads": 1,
        "cache_bytes_per_token": 1280, "machine": MACHINE, "heldout": heldout, "absent": {"x": "left out"},
    }  # fmt: skip
    text = bench_generate.render([ours, drafted], facts)
    for part in ("batch 2", "trimtab mtp", "50%", "75%", "1,280 bytes", "int8", "0.50%", "10.00%", "x: left out"):
        assert part in text, part


def test_the_benchmark_runs_and_leaves_out_what_cannot(tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(
        "[model]\nvocab_size = 64\nhidden_size = 32\nnum_hidden_layers = 2\nnum_nextn_predict_layers = 0\n"
    )
    arguments = ["bench", "generate", "--config", str(config), "--batches", "2", "--prompt-tokens", "5", "--new-tokens",
                 "3", "--repeats", "1", "--inner", "1", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    assert main([*arguments, "--only", "trimtab;trimtab mtp;trimtab draft run"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["way"] for row in record["rows"]] == ["trimtab"] and record["rows"][0]["same_tokens"] == 1.0
    assert set(record["absent"]) == {"trimtab mtp", "trimtab draft run"}
    assert (tmp_path / "out" / "generate.csv").is_file()
    assert main([*arguments, "--only", "nobody"]) == 2
    assert main(["bench", "generate", "--run", str(tmp_path), "--new-tokens", "1", "--batches", "0"]) == 2
    said = capsys.readouterr().err
    assert "--new-tokens 1" in said and "--batches 0" in said and "is not a run" in said
    assert WAYS["trimtab"].bits == 32
