"""The choice by measured speed and the tile sizes: measured once, kept on disk, wrong or impossible ones left out."""

import json
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

import pytest
import torch

from kernels.choice import both_ways, fastest, measure
from kernels.measured import MeasuredCache, default_cache, keep_in, seconds
from kernels.tuning import HALF, INTERPRETED, blocks_for, measure_blocks

CPU = torch.device("cpu")


def trial(delays, log, wrong=()):
    def run(name):
        log.append(name)
        time.sleep(delays[name])
        return [torch.full((2,), 9.0 if name in wrong else 1.0)]

    return run


def test_the_fastest_is_taken_measured_once_and_known_to_the_next_process(tmp_path):
    log = []
    run = trial({"reference": 0.02, "torch": 0.0, "triton": 0.01}, log)
    names = ("reference", "torch", "triton")
    assert measure("op", (8, 4), CPU, run, names, MeasuredCache(tmp_path)) == "torch"
    assert set(log) == set(names)
    log.clear()
    assert measure("op", (8, 4), CPU, run, names, MeasuredCache(tmp_path)) == "torch"
    assert log == []
    measure("op", (16, 4), CPU, run, names, MeasuredCache(tmp_path))
    assert log


def test_a_wrong_result_is_left_out_however_fast(tmp_path):
    run = trial({"reference": 0.01, "triton": 0.0}, [], wrong=("triton",))
    with pytest.warns(UserWarning, match="triton is not used"):
        assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "reference"


@pytest.mark.parametrize("error", [
    NotImplementedError("no such instruction"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]),  # no Python.h
    AssertionError("libcuda.so cannot found!"),
    OSError("ld: cannot find -lcuda"),
])  # fmt: skip
def test_a_candidate_that_cannot_run_is_left_out_whatever_it_raises(tmp_path, error):
    def run(name):
        if name == "triton":
            raise error
        return [torch.zeros(1)]

    with pytest.warns(UserWarning, match=f"triton is not used.*{type(error).__name__}") as told:
        assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "reference"
        assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "reference"
    assert len(told) == 1  # the answer is kept


@pytest.mark.skipif("triton" not in sys.modules and find_spec("triton") is None, reason="triton has no package here")
def test_no_compiler_is_such_an_error(tmp_path, monkeypatch):
    from triton.runtime.build import compile_module_from_src

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def run(name):
        if name == "triton":
            compile_module_from_src("int nothing;", "no_compiler_probe")
        return [torch.zeros(1)]

    with pytest.warns(UserWarning, match="C compiler"):
        assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "reference"


def test_what_the_reference_raises_and_a_lost_device_are_the_callers(tmp_path):
    def broken(name):
        raise KeyError(name)

    with pytest.raises(KeyError):
        measure("other", (), CPU, broken, ("reference", "triton"), MeasuredCache(tmp_path))

    def lost(name):
        if name == "triton":
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return [torch.zeros(1)]

    with pytest.raises(torch.AcceleratorError):
        measure("other", (), CPU, lost, ("reference", "triton"), MeasuredCache(tmp_path))


@pytest.mark.parametrize("where", ["reference", "triton"])
def test_without_memory_to_measure_the_reference_is_taken_and_nothing_is_kept(tmp_path, where):
    room = []

    def run(name):
        if name == where and not room:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        time.sleep(0.01 if name == "reference" else 0.0)
        return [torch.zeros(1)]

    with pytest.warns(UserWarning, match="no memory"):
        assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "reference"
    room.append(True)
    assert measure("op", (), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)) == "triton"


def test_large_results_and_nan_are_compared_by_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.choice._CHUNK", 7)
    exact = torch.arange(50.0)
    for wrong, used in ((exact, True), (exact + 1.0, False), (torch.where(exact == 49, torch.nan, exact), False)):

        def run(name, wrong=wrong):
            time.sleep(0.005 if name == "reference" else 0.0)
            return [exact if name == "reference" else wrong]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = measure(
                "op", (used, wrong.sum().item()), CPU, run, ("reference", "triton"), MeasuredCache(tmp_path)
            )
        assert (chosen == "triton") is used


def test_a_user_without_a_home_measures_all_the_same(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("kernels.measured.Path.home", no_home)
    assert "trimtab-kernels-" in str(default_cache.__wrapped__().folder)


def test_on_a_cpu_nothing_is_measured(tmp_path):
    log = []
    cache = MeasuredCache(tmp_path / "none")
    assert fastest("op", (), torch.zeros(1), trial({}, log), ("reference", "triton"), cache) == "reference"
    assert blocks_for("op", (), CPU, HALF, log.append, cache) == INTERPRETED
    assert log == []
    assert not (tmp_path / "none").exists()


def test_tile_sizes_the_fastest_is_kept_while_it_is_a_candidate(tmp_path):
    log = []

    def launch(blocks):
        log.append(blocks)
        time.sleep(0.0 if blocks == HALF[2] else 0.005)

    assert measure_blocks("op", (1,), CPU, HALF[:3], launch, MeasuredCache(tmp_path)) == HALF[2]
    log.clear()
    assert measure_blocks("op", (1,), CPU, HALF[:3], launch, MeasuredCache(tmp_path)) == HALF[2]
    assert log == []
    assert measure_blocks("op", (1,), CPU, HALF[:2], launch, MeasuredCache(tmp_path)) in HALF[:2]


def test_tile_sizes_that_do_not_fit_are_passed_over(tmp_path):
    errors = pytest.importorskip("triton.runtime.errors", reason="triton has no package for this operating system")

    def launch(blocks):
        if blocks != HALF[1]:
            raise errors.OutOfResources(300_000, 232_448, "shared memory")

    assert measure_blocks("op", (), CPU, HALF[:3], launch, MeasuredCache(tmp_path)) == HALF[1]
    with pytest.raises(RuntimeError, match="none of 1 tile sizes runs on cpu: OutOfResources"):
        measure_blocks("other", (), CPU, HALF[:1], launch, MeasuredCache(tmp_path))


def test_a_damaged_or_unwritable_cache_costs_a_measurement_and_no_more(tmp_path):
    cache = MeasuredCache(tmp_path)
    cache.put(CPU, "op", (1,), "torch")
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text()) == {"op 1": "torch"}
    file.write_text("{half")
    assert MeasuredCache(tmp_path).get(CPU, "op", (1,)) is None
    (tmp_path / "file").write_text("")
    blocked = MeasuredCache(tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        blocked.put(CPU, "op", (1,), "torch")
    assert blocked.get(CPU, "op", (1,)) == "torch"


def test_two_processes_add_to_one_file(tmp_path):
    one, other = MeasuredCache(tmp_path), MeasuredCache(tmp_path)
    assert other.get(CPU, "op", (2,)) is None
    one.put(CPU, "op", (1,), "torch")
    other.put(CPU, "op", (2,), "triton")
    assert MeasuredCache(tmp_path).get(CPU, "op", (1,)) == "torch"
    assert MeasuredCache(tmp_path).get(CPU, "op", (2,)) == "triton"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_both_ways_gives_value_and_gradients_and_leaves_the_inputs_alone():
    x, ids = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([1, 0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out, grad = both_ways(lambda x, ids, none: x[ids].square(), x, ids, None)
    assert out.tolist() == [9.0, 4.0]
    assert grad.tolist() == [4.0, 6.0]
    assert x.grad is None


def test_seconds_are_seconds():
    assert 0.005 <= seconds(lambda: time.sleep(0.005), CPU) < 5


def test_measurements_can_be_kept_elsewhere(tmp_path):
    before = default_cache().folder
    try:
        keep_in(tmp_path)
        default_cache().put(CPU, "op", (1,), "torch")
        assert MeasuredCache(tmp_path).get(CPU, "op", (1,)) == "torch"
        keep_in(tmp_path / "empty")
        assert default_cache().get(CPU, "op", (1,)) is None
    finally:
        keep_in(before)
