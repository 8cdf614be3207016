"""Which device DeepSpeed makes its own: the one that this process sees, whatever the rank's place on its node."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Ray, and Slurm with one GPU a task, show each process one device, number 0; the accelerator is a stand-in.
PROGRAM = """
import os, sys
from types import SimpleNamespace
from unittest import mock
import torch, torch.distributed as dist
from parallel import zero
from parallel.config import OptimizerConfig
from parallel.layout import Layout

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
for device, local_rank, expected in ((("cuda", 0), 3, "0"), (("cuda", 2), 2, "2"), (("cpu", None), 3, "3")):
    zero.prepare_deepspeed("gloo", local_rank, SimpleNamespace(type=device[0], index=device[1]))
    assert os.environ["LOCAL_RANK"] == expected, os.environ["LOCAL_RANK"]

from deepspeed.accelerator import get_accelerator

seen = []
with mock.patch.object(type(get_accelerator()), "set_device", lambda self, index: seen.append(index)):
    prepare = zero.prepare_deepspeed
    with mock.patch.object(zero, "prepare_deepspeed",
                           lambda backend, rank, device: prepare(backend, rank, SimpleNamespace(type="cuda", index=0))):
        zero.ZeroEngine(
            torch.nn.Linear(4, 4, bias=False), OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
            Layout(1, 1, 0), stage=1, n_experts=1, precision="fp32", micro_batch_size=2, accumulation_steps=1,
            device=torch.device("cpu"), local_rank=1,
        )
assert seen == [0], seen
settings = zero.deepspeed_config(1, "bf16", 1, 1, 1, "nccl")
assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
assert settings["zero_optimization"]["overlap_comm"] is False  # one rank reduces nothing
assert zero.deepspeed_config(1, "bf16", 1, 1, 2, "nccl")["zero_optimization"]["overlap_comm"] is True
print("as it should be")
"""


def test_local_rank_is_the_devices_number(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "as it should be" in done.stdout
