"""The same training through every launcher: the same losses, counts and biases."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import metrics


@pytest.mark.slow
@pytest.mark.ray
def test_debug_local_ray_and_mpi_give_the_same_numbers(trimtab, config: Path, tmp_path: Path) -> None:
    import sys

    from cluster.mpi import mpirun_environment

    mpirun = str(Path(sys.executable).parent / "mpirun")
    commands = {
        "one": ["train", config, "--launcher", "debug"],
        "debug": ["train", config, "parallel.virtual_ranks=2", "--launcher", "debug"],
        "local": ["train", config, "--launcher", "local"],
        "ray": ["submit", config],
    }
    for name, command in commands.items():
        done = trimtab(*command, "--run", tmp_path / name, "--no-summary", "--json")
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        figures = json.loads(done.stdout.splitlines()[-1])
        assert (figures["exit_status"], figures["last_step"]) == (0, 6)
    done = trimtab(
        config, "--launcher", "mpi", "--run", tmp_path / "mpi", "--no-summary",
        command=[mpirun, "-n", "2", sys.executable, "-m", "launch", "train"], **mpirun_environment(),
    )  # fmt: skip
    assert done.returncode == 0, f"mpi: {done.stdout}\n{done.stderr}"

    reference = metrics(tmp_path / "one")
    assert [record["step"] for record in reference] == [1, 2, 3, 4, 5, 6]
    assert reference[-1]["loss"] < reference[0]["loss"]
    for name in ("debug", "local", "ray", "mpi"):
        found = metrics(tmp_path / name)
        for key in ("loss", "grad_norm", "mtp_loss"):
            assert [record[key] for record in found] == pytest.approx([r[key] for r in reference], rel=2e-5), (
                name,
                key,
            )
        for key in ("tokens_per_expert", "expert_bias", "tokens", "lr"):
            assert [record[key] for record in found] == [record[key] for record in reference], (name, key)
        assert found[0]["world_size"] == 2


@pytest.mark.slow
def test_mpi_with_four_ranks_trains(trimtab, config: Path, tmp_path: Path) -> None:
    import sys

    from cluster.mpi import mpirun_environment

    done = trimtab(
        config, "--launcher", "mpi", "parallel.ep_size=4", "train.steps=2", "--run", tmp_path / "mpi",
        command=[str(Path(sys.executable).parent / "mpirun"), "-n", "4", sys.executable, "-m", "launch", "train"],
        **mpirun_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out" in done.stdout, "rank 0 prints the summary, once"
    assert done.stdout.count("held-out   ") == 1
    assert [record["world_size"] for record in metrics(tmp_path / "mpi")] == [4, 4]
