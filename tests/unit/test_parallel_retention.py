"""Which checkpoints stay."""

from pathlib import Path

import pytest

from parallel.retention import kept_steps, prune, recover


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
