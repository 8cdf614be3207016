"""Which checkpoints stay."""

import os
from pathlib import Path

import pytest

from parallel.retention import kept_steps, prune, recover
from parallel.roots import committed, newest_step, readable


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [(2, 0, {500, 600}), (0, 0, {100, 200, 300, 400, 500, 600}), (1, 300, {300, 600}), (2, 200, {200, 400, 500, 600}),
     (9, 0, {100, 200, 300, 400, 500, 600})],
)  # fmt: skip
def test_the_newest_and_every_so_manieth(keep: int, every: int, kept: set[int]) -> None:
    assert kept_steps([300, 100, 200, 600, 500, 400], keep, every) == kept


def test_order_is_by_number_and_not_by_name() -> None:
    assert kept_steps([9, 10, 100], 1) == {100}


def make(root: Path, *names: str) -> None:
    """Folders with a commit."""
    for name in names:
        (root / name).mkdir()
        (root / name / "COMMIT").write_text("x")


def test_pruning_touches_nothing_but_checkpoints_and_drafts(tmp_path: Path) -> None:
    make(tmp_path, *(f"step-{n:08d}" for n in (10, 20, 30, 40)), ".step-00000050.tmp", "step-mine", "notes")
    assert [path.name for path in prune(tmp_path, 1, 30, 20)] == ["step-00000010", "step-00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000020", "step-00000030", "step-mine"]


def test_only_what_was_published_and_is_missing_is_put_back(tmp_path: Path) -> None:
    make(tmp_path, ".step-00000010.old", ".step-00000020.old", "step-00000020")
    (tmp_path / ".step-00000030.old").mkdir()
    assert [path.name for path in recover(tmp_path)] == ["step-00000010"]
    assert recover(tmp_path / "nothing here") == []


def test_the_times_of_files_do_not_matter(tmp_path: Path) -> None:
    """As after a clock that was set back: the newest steps have the oldest files."""
    steps = (10, 20, 30, 40)
    make(tmp_path, *(f"step-{step:08d}" for step in steps))
    for step in steps:
        for path in (tmp_path / f"step-{step:08d}" / "COMMIT", tmp_path / f"step-{step:08d}"):
            os.utime(path, (2e9 - 3600 * step,) * 2)
    assert [path.name for path in committed(tmp_path)] == [f"step-{step:08d}" for step in steps]
    assert newest_step(tmp_path) == 40 and readable(tmp_path) == committed(tmp_path)
    prune(tmp_path, 2, 40)
    assert [path.name for path in committed(tmp_path)] == ["step-00000030", "step-00000040"]
