"""Whether this machine has the GPUs that a configuration insists on, and room for its processes; without torch."""

import glob
import importlib.util
import os
import re
from pathlib import Path

from cluster.cores import usable_cores
from launch.config import Config


def device_problems(config: Config) -> list[str]:
    """A sentence where cluster.accelerator = "gpu" cannot be had in processes of this machine."""
    if config.cluster.accelerator != "gpu":
        return []
    reason = why_no_gpu()
    if not reason:
        return []
    return [
        f'cluster.accelerator = "gpu", but {reason}; use cluster.accelerator=cpu, or auto, which takes a GPU where '
        "there is one"
    ]


def why_no_gpu() -> str:
    """Why no GPU can be used here, as a clause; empty where one may be there, which torch says for certain."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    build = torch_build()
    if build.endswith("+cpu"):
        return f"the installed torch {build} is a CPU build"
    # NVIDIA's driver, the same inside WSL, AMD's driver, Jetson boards.
    if not any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu")):
        return "this machine has no GPU, or no driver for one (there is no /dev/nvidia0)"
    return ""


def torch_build() -> str:
    """The installed torch's version, such as `2.13.0+cpu`; empty where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return ""
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return match[1] if match else ""


RANKS_PER_CORE = 8  # tests of many ranks on a small machine stay below; 1,024 processes on 2 cores stop the machine


def local_process_problems(config: Config) -> list[str]:
    """Whether this machine can hold the processes of the local launcher, each of which loads torch."""
    cores, workers = usable_cores(), config.cluster.workers
    most = max(16, RANKS_PER_CORE * cores)
    if workers <= most:
        return []
    return [
        f"cluster.workers = {workers}: the local launcher starts them all on this machine, which has {cores} "
        f"cores and is given at most {most} processes; use cluster.workers={cores}, or --launcher ray or mpi on "
        "as many nodes as the configuration is meant for"
    ]
