"""A run's folder: what counts as one, whole lines whatever happens, and which records a resumed run keeps."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.runfolder import (
    DamagedRecordError,
    JsonLines,
    RunFolder,
    committed_ledger,
    committed_metrics,
    finite_json,
    problem,
    read_records,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create('[train]\nname = "x"\n')
    return folder


def log(run: RunFolder, *steps: int, world: int = 1) -> None:
    for step in steps:
        run.metrics.append({"step": step, "world_size": world})
        run.ledger.append({"step": step, "epoch": 0, "hash": f"{step:016x}"})


def kept(run: RunFolder) -> list[tuple[int, int]]:
    return [(record["step"], record["world_size"]) for record in committed_metrics(run)]


def test_create_makes_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "b")
    assert not run.is_run() and not run.path.exists()
    run.create("x = 1\n")
    assert run.is_run() and run.config.read_text() == "x = 1\n"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.toml", "logs", "tensorboard"]
    run.create("x = 2\n")  # a resume may change what is allowed to change
    assert run.config.read_text() == "x = 2\n"


def test_what_may_become_a_run_folder(tmp_path: Path, run: RunFolder) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").touch()
    assert problem(tmp_path / "new" / "deeper") is None
    assert problem(empty) is None
    assert problem(run.path) is None


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").touch()
    message = problem(other)
    assert message is not None and "not a run" in message and "chapter1.tex" in message and "config.toml" in message
    file = other / "chapter1.tex"
    assert "is a file" in (problem(file) or "")
    assert "is a file" in (problem(file / "run") or "")


def test_numbers_that_json_does_not_know_become_null_with_a_note() -> None:
    record = json.loads(finite_json({"step": 3, "loss": float("nan"), "bias": [[1.0, float("-inf")]], "lr": 0.1}))
    assert record == {"step": 3, "loss": None, "bias": [[1.0, None]], "lr": 0.1,
                      "non_finite": {"loss": "nan", "bias": "-inf"}}  # fmt: skip
    assert "non_finite" not in json.loads(finite_json({"loss": 1.0}))


def test_each_record_is_on_disk_at_once(run: RunFolder) -> None:
    for step in (1, 2, 3):
        log(run, step)
        assert [r["step"] for r in read_records(run.metrics_path)] == list(range(1, step + 1))


def test_a_truncated_last_line_is_left_out_and_the_next_record_is_whole(run: RunFolder) -> None:
    log(run, 1, 2)
    run.close()
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step":3,"world_si')
    assert kept(run) == [(1, 1), (2, 1)]
    again = RunFolder(run.path)
    log(again, 3, world=2)
    assert kept(again) == [(1, 1), (2, 1), (3, 2)]
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3]


def test_a_last_line_that_lost_only_its_end_is_kept(run: RunFolder) -> None:
    run.metrics_path.write_bytes(b'{"step":1,"world_size":1}')
    log(run, 2)
    assert kept(run) == [(1, 1), (2, 1)]


@pytest.mark.parametrize("size", [10, 65535, 65536, 200_000])
def test_a_torn_line_of_any_length_is_cut(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"x":"' + b"a" * size)
    file = JsonLines(path)
    assert file.size() == len(b'{"step":1}\n')
    file.append({"step": 2})
    assert read_records(path) == [{"step": 1}, {"step": 2}]


def test_damage_in_the_middle_is_an_error_that_names_the_line(run: RunFolder) -> None:
    run.metrics_path.write_bytes(b'{"step":1}\n{"ste\n{"step":3}\n')
    with pytest.raises(DamagedRecordError, match=r"metrics.jsonl, line 2, is not a JSON object"):
        committed_metrics(run)


def test_a_write_that_fails_half_way_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    real, calls = os.write, []

    def disk_fills_up(fd: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[:5])

    monkeypatch.setattr(os, "write", disk_fills_up)
    with pytest.raises(OSError, match="No space left"):
        file.append({"step": 2})
    monkeypatch.undo()
    file.append({"step": 3})
    assert read_records(file.path) == [{"step": 1}, {"step": 3}]


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write(writer: int) -> None:
        file = JsonLines(path)
        for i in range(200):
            file.append({"writer": writer, "i": i, "text": "x" * (i * 7)})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = read_records(path)
    assert sorted((r["writer"], r["i"]) for r in records) == [(n, i) for n in range(3) for i in range(200)]


def test_events_have_a_time_and_a_cause(run: RunFolder) -> None:
    run.event("start", cause="trimtab train debug", world_size=2)
    run.event("save", cause="every 100 steps", step=100)
    first, second = read_records(run.events_path)
    assert list(first) == ["time", "seconds", "process", "kind", "cause", "world_size"]
    assert first["time"].endswith("Z") and 0 <= first["seconds"] <= second["seconds"]
    assert first["process"] == second["process"] and first["process"].startswith(f"{os.getpid()}-")
    with pytest.raises(ValueError, match="give a kind, a cause"):
        run.event("stop", cause="")
    with pytest.raises(ValueError, match="seconds"):
        run.event("stop", cause="x", seconds=3)
    with pytest.raises(ValueError, match="process"):
        run.event("stop", cause="x", process="mine")


def test_rewind_drops_later_steps_at_once(run: RunFolder) -> None:
    log(run, 1, 2, 3, 4, 5)
    assert run.rewind(3, cause="resume from step 3") == 2
    assert kept(run) == [(1, 1), (2, 1), (3, 1)]
    log(run, 4, world=2)  # step 5 is not done again yet: its old record must not come back
    assert kept(run) == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert len(read_records(run.metrics_path)) == 6  # nothing is deleted
    (event,) = read_records(run.events_path)
    assert (event["kind"], event["step"], event["dropped_steps"]) == ("rewind", 3, 2)


def test_rewinds_may_follow_each_other(run: RunFolder) -> None:
    log(run, 1, 2, 3, 4)
    run.rewind(2, cause="first")
    log(run, 3, 4, 5, world=2)
    run.rewind(4, cause="second")
    log(run, 5, world=3)
    run.rewind(1, cause="third")
    log(run, 2, world=4)
    assert kept(run) == [(1, 1), (2, 4)]
    assert [r["step"] for r in committed_ledger(run)] == [1, 2]


def test_a_rewind_that_drops_nothing_is_no_event(run: RunFolder) -> None:
    assert run.rewind(0, cause="a new run") == 0
    log(run, 1, 2)
    assert run.rewind(2, cause="resume after a clean stop") == 0
    assert not run.events_path.exists()


def test_rewind_after_a_torn_line_does_not_swallow_the_next_records(run: RunFolder) -> None:
    log(run, 1, 2, 3)
    run.close()
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step":4,"world_size":1,"more":"' + b"a" * 500)
    again = RunFolder(run.path)
    again.rewind(1, cause="resume from step 1")
    log(again, 2, 3, world=2)
    assert kept(again) == [(1, 1), (2, 2), (3, 2)]


def test_without_an_event_the_last_record_of_a_step_counts(run: RunFolder) -> None:
    log(run, 1, 2, 3)
    log(run, 2, 3, world=2)
    assert kept(run) == [(1, 1), (2, 2), (3, 2)]


def test_the_telemetry_modules_import_neither_torch_nor_any_optional_package() -> None:
    modules = (
        "runfolder telemetry step_record charts tensorboard console balance_stats alarms report history findings "
        "pictures plots balance_plots heatmap compressors"
    )
    code = f"import sys; [__import__('launch.' + m) for m in '{modules}'.split()]; print(sorted(sys.modules))"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    for package in ("torch", "tensorboard", "rich", "matplotlib", "PIL", "ray", "deepspeed"):
        assert f"'{package}'" not in loaded


AS_USER = """
import os, sys
from pathlib import Path
from cluster.logs import begin_log, rank_log
from launch.config import dump, read
from launch.identity import take_place
from launch.lock import only_driver
from launch.runfolder import RunFolder, problem
from launch.sections import Sections
folder, user, group, mask = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4], 8)
os.setgroups([group]); os.setgid(group); os.setuid(user); os.umask(mask)
if wrong := problem(folder):
    print(wrong); raise SystemExit(2)
with only_driver(folder):
    config = read("debug", [], [])
    take_place(folder, config, ())
    run = RunFolder(folder)
    run.create(dump(config))
    for file in (run.events, run.metrics, run.ledger, run.orders):
        file.append({"user": user})
    begin_log(rank_log(run.logs, 0), 0, 0)
    Sections(run.logs, 0).mark("start")
    run.event("fault", cause="a drill")
"""


def test_a_colleague_of_the_group_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with setgid, umask 002, and two users; with umask 022 the second one is refused by name."""
    import shutil
    import subprocess
    import sys
    import tempfile

    shared = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        os.chown(shared, 0, 4242)
        shared.chmod(0o2775)

        def as_user(user: int, folder: str, mask: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                [sys.executable, "-c", AS_USER, str(shared / folder), str(user), "4242", mask],
                cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=120,
            )  # fmt: skip

        for user in (51001, 51002):
            done = as_user(user, "run", "002")
            assert done.returncode == 0, done.stdout + done.stderr
        assert [record["user"] for record in read_records(shared / "run" / "ledger.jsonl")] == [51001, 51002]
        assert {path.stat().st_gid for path in (shared / "run").rglob("*")} == {4242}
        assert all(path.stat().st_mode & 0o020 for path in (shared / "run").rglob("*"))
        assert as_user(51001, "alone", "022").returncode == 0
        refused = as_user(51002, "alone", "022")
        assert refused.returncode == 2, refused.stderr
        assert "(of user 51001)" in refused.stdout and "is not writable for user 51002" in refused.stdout
        (shared / "run" / "events.jsonl").chmod(0o644)
        refused = as_user(51002, "run", "002")
        assert refused.returncode == 2 and f"{shared / 'run' / 'events.jsonl'} (of user 51001)" in refused.stdout
    finally:
        shutil.rmtree(shared)
