"""Values at the ends of their ranges really start: what the check accepts, a run in one process accepts as well."""

import os
import shutil
from pathlib import Path

import pytest

from data.pack import pack
from launch import bounds
from launch.cli import main
from launch.config import Config
from launch.schema import show
from model.config import YarnConfig
from tests.end_to_end.docs_commands import ROOT
from tests.end_to_end.test_docs_commands import TINY

# Their upper ends are sizes: of memory, of time, of threads.
SIZES = {
    "model.vocab_size", "model.hidden_size", "model.num_hidden_layers", "model.num_nextn_predict_layers",
    "model.num_attention_heads", "model.q_lora_rank", "model.kv_lora_rank", "model.qk_nope_head_dim",
    "model.qk_rope_head_dim", "model.v_head_dim", "model.intermediate_size", "model.moe_intermediate_size",
    "model.n_routed_experts", "model.n_shared_experts", "train.steps", "train.global_batch_size",
    "train.micro_batch_size", "parallel.virtual_ranks", "data.seq_len", "data.lanes",
}  # fmt: skip
RANGES = {
    f"{section}.{key}": text
    for section, field in Config.__dataclass_fields__.items()
    for key, text in bounds.ranges(field.default_factory).items()  # type: ignore[misc]
} | {f"model.rope_scaling.{key}": text for key, text in bounds.ranges(YarnConfig).items()}


def edges(key: str) -> list[str]:
    """The ends of a key's range as they are written on the command line, those inside it."""
    found = []
    for part in bounds.parts(RANGES[key]):
        ends = [(part.low, part.with_low), (part.high, part.with_high and key not in SIZES)]
        found += [show(int(end) if end == int(end) else end) for end, inside in ends if inside]
    if key == "optimizer.betas":
        return [f"[{one}, {one}]" for one in found]
    return [] if key in ("data.weights", "data.curriculum") else list(dict.fromkeys(found))


STARTS = [(section, f"{key}={value}") for key in RANGES for section in [key.split(".")[0]] for value in edges(key)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    pack([str(ROOT / "cluster" / "config.py"), str(ROOT / "cluster" / "local.py")], folder / "datasets" / "python",
         tokenizer="bytes", heldout_kib=1)  # fmt: skip
    return folder


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("section", sorted({section for section, _ in STARTS}))
def test_the_ends_of_every_range_start(
    section: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    wrong = []
    for own, assignment in STARTS:
        if own == section:
            shutil.rmtree("runs", ignore_errors=True)
            status = main(
                [
                    "train",
                    "debug",
                    *TINY,
                    "train.steps=1",
                    assignment,
                    "--launcher",
                    "debug",
                    "--no-summary",
                    "--run",
                    "runs/one",
                ]
            )
            said = capsys.readouterr()
            if status not in (0, 2) or (status == 2 and os.path.exists("runs/one")):
                wrong.append(f"{assignment}: status {status}\n{said.err[-1500:]}")
    assert not wrong, "\n\n".join(wrong)
