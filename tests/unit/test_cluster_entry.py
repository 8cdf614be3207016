"""Entries by name, JSON in and out, and the environment of a rank."""

import gc
import json

import pytest

from cluster.context import RankContext
from cluster.entry import encode, prepare_environment, resolve, run_entry, thread_count
from cluster.flag import StopFlag
from cluster.process import uncollected

ENTRIES = "tests.ray.entries"


def context(**change):
    fields = {"rank": 1, "world_size": 4, "local_rank": 1, "local_world_size": 2, "node_rank": 0, "n_nodes": 2}
    return RankContext(**{**fields, "init_method": "tcp://10.0.0.1:20000", **change})


def test_context_survives_json_without_its_event():
    original = context(generation=3, launcher="ray", interface="eth0", device_index=1)
    copy = RankContext.from_json(original.to_json())
    assert copy == original
    assert isinstance(copy.stop, StopFlag) and copy.stop is not original.stop


@pytest.mark.parametrize("name", ["os", "os:", ":f", "os:no such", "os:path", "json:missing"])
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match="entry"):
        resolve(name)


def test_unknown_module_is_an_import_error():
    with pytest.raises(ImportError):
        resolve("no_such_module_here:main")


def test_what_json_cannot_hold_is_named_by_its_path():
    with pytest.raises(TypeError, match=r"the payload\['a'\]\[1\]\['b'\] is of type set"):
        encode({"a": [1, {"b": {1, 2}}]}, "the payload")
    with pytest.raises(TypeError, match="key"):
        encode({"a": {(1, 2): 3}}, "the payload")
    with pytest.raises(TypeError, match="dict"):
        encode([1], "the payload")


def test_a_result_is_reported():
    report = run_entry(f"{ENTRIES}:echo", json.dumps({"x": [1, None, "é"]}), context())
    assert report["ok"] and report["result"] == {"rank": 1, "payload": {"x": [1, None, "é"]}}


def test_an_exception_is_reported_from_the_entry_on():
    report = run_entry(f"{ENTRIES}:fail", '{"rank": 1}', context())
    assert (report["ok"], report["kind"], report["exit_code"]) == (False, "exception", 1)
    assert report["error"].rstrip().endswith("ValueError: rank 1 was told to fail")
    assert "in run_entry" not in report["error"]


def test_a_report_holds_no_secret(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "no_such_module_here")  # as the error will say it
    report = run_entry("no_such_module_here:main", "{}", context())
    assert "***STORE_PASSWORD***" in report["error"] and "no_such_module_here" not in report["error"]


def test_sys_exit_is_reported_with_its_status():
    report = run_entry(f"{ENTRIES}:leave", '{"status": 2}', context())
    assert (report["kind"], report["exit_code"]) == ("exited", 2)
    report = run_entry(f"{ENTRIES}:leave", '{"status": 0}', context())
    assert (report["ok"], report["exit_code"]) == (False, 1)


def test_a_result_that_json_cannot_hold_is_the_ranks_failure():
    report = run_entry(f"{ENTRIES}:unfit", "{}", context())
    assert not report["ok"] and "the result of" in report["error"]


def test_environment_is_cleared_of_other_launchers_and_told_the_rank():
    environment = {"PMIX_RANK": "7", "OMPI_COMM_WORLD_SIZE": "9", "SLURM_PROCID": "3", "MASTER_PORT": "1", "HOME": "/h"}
    prepare_environment(environment, context(interface="lo"), threads=3)
    assert environment == {
        "HOME": "/h",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "3",
    }


def test_mpirun_keeps_its_own_variables():
    environment = {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "0"}
    prepare_environment(environment, context(), threads=1, strip=False)
    assert environment["OMPI_COMM_WORLD_SIZE"] == "4" and environment["RANK"] == "1"


def test_threads():
    assert thread_count(5, 2) == 5
    assert thread_count(0, 10_000) == 1
    assert thread_count(0, 1) >= 1


def test_cycles_are_searched_for_again_after_an_import(tmp_path, monkeypatch):
    (tmp_path / "made_up_entry.py").write_text("import gc\ncollects = gc.isenabled()\ndef run(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("made_up_entry:run").__globals__["collects"] is False and gc.isenabled()
    with pytest.raises(ImportError):
        resolve("made_up_entry_that_is_missing:run")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()  # somebody wanted it so
    finally:
        gc.enable()
