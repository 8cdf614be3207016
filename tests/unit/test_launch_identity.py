"""Whose a place for checkpoints is: another run is refused, moved and copied folders are told apart."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from launch import preflight
from launch.config import Config, ConfigError, dump, read
from launch.identity import identity_of, standing, take_place
from launch.runfolder import RunFolder
from parallel.ownership import Identity, claim, owner_of, run_id_at
from parallel.retention import prune
from parallel.roots import committed
from tests import object_store


def config(place: Path | str = "", *more: str) -> Config:
    return read("debug", [*([f"checkpoint.dir={place}"] if place else []), *more], [])


def begin(folder: Path, settings: Config, *steps: int, accepted: tuple[str, ...] = ()) -> Identity:
    """What a start does with a folder, and its saves."""
    folder.mkdir(parents=True, exist_ok=True)
    own = take_place(folder, settings, accepted)
    RunFolder(folder).create(dump(settings))
    root = Path(settings.checkpoint.dir or folder / "checkpoints")
    for step in steps:
        saved(root, step, settings, own)
    return own


def saved(root: Path, step: int, settings: Config, own: Identity | None) -> None:
    path = root / f"step-{step:08d}"
    path.mkdir(parents=True)
    told = {"run": {"id": own.id, "folder": own.folder}} if own else {}
    (path / "manifest.json").write_text(json.dumps({"config": asdict(settings), **told}))
    (path / "COMMIT").write_text("x")


def refusal(folder: Path, settings: Config, resume: str = "auto", accepted: tuple[str, ...] = ()) -> str:
    problems: list[str] = []
    preflight._check_run(folder, settings, resume, accepted, None, problems, [])
    return "\n".join(problems)


def test_another_run_is_refused_however_it_resumes(tmp_path: Path) -> None:
    shared = config(tmp_path / "ckpt")
    first = begin(tmp_path / "a", shared, 3, 6)
    for resume in ("auto", "must", "never"):
        said = refusal(tmp_path / "b", shared, resume)
        assert f"belongs to the run {tmp_path / 'a'} (id {first.id}" in said and str(tmp_path / "b") in said, resume
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="belongs to the run"):
        take_place(tmp_path / "b", shared, ())
    assert refusal(tmp_path / "a", shared) == "" and begin(tmp_path / "a", shared).id == first.id
    begin(tmp_path / "b", config())
    assert "belongs to the run" in refusal(tmp_path / "b", shared), "a run that has an identity of its own as well"
    assert "belongs to the run" in refusal(tmp_path / "b", shared, accepted=("checkpoint.dir",))


def test_a_place_is_claimed_before_anything_is_saved(tmp_path: Path) -> None:
    shared = config(tmp_path / "ckpt")
    begin(tmp_path / "a", shared)
    assert "belongs to the run" in refusal(tmp_path / "b", shared)
    assert "belongs to the run" in refusal(tmp_path / "b", config(tmp_path / "ckpt", "train.seed=3"), "never")


def test_the_folder_of_another_run_is_no_place_either(tmp_path: Path) -> None:
    begin(tmp_path / "a", config(), 3)
    (tmp_path / "a" / "identity.json").unlink()
    (tmp_path / "a" / "checkpoints" / "OWNER.json").unlink()  # as an older version left it
    said = refusal(tmp_path / "b", config(tmp_path / "a" / "checkpoints"))
    assert str(tmp_path / "a") in said and "belongs to the run" in said


def test_of_two_that_claim_at_once_one_has_it(tmp_path: Path) -> None:
    one, other = Identity("1" * 16, "/a"), Identity("2" * 16, "/b")
    assert claim(tmp_path / "c", one, None) == claim(tmp_path / "c", other, None) == owner_of(tmp_path / "c") == one
    assert claim(tmp_path / "c", other, one) == other
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["OWNER.json"]
    (tmp_path / "c" / "OWNER.json").write_text("{}")
    with pytest.raises(OSError, match="does not say whose"):
        owner_of(tmp_path / "c")


def test_runs_of_older_versions_go_on(tmp_path: Path) -> None:
    for place in ("", tmp_path / "outside"):
        folder, settings = tmp_path / f"run{bool(place)}", config(place)
        RunFolder(folder).create(dump(settings))
        saved(Path(place or folder / "checkpoints"), 4, settings, None)
        assert refusal(folder, settings) == ""
        own = take_place(folder, settings, ())
        assert own.owns("") and identity_of(folder) == own
        owner = owner_of(Path(place or folder / "checkpoints"))
        assert owner is not None and owner.id == own.id


def test_checkpoints_of_nobody_are_taken_only_where_that_is_accepted(tmp_path: Path) -> None:
    settings = config(tmp_path / "old")
    saved(tmp_path / "old", 4, settings, None)
    said = refusal(tmp_path / "new", settings)
    assert "nothing says of which run" in said and "--accept-change checkpoint.dir" in said
    assert refusal(tmp_path / "new", settings, accepted=("checkpoint.dir",)) == ""
    assert "train.seed" in refusal(
        tmp_path / "new", config(tmp_path / "old", "train.seed=3"), accepted=("checkpoint.dir",)
    )
    assert "already has" in refusal(tmp_path / "new", settings, "never", ("checkpoint.dir",))
    begin(tmp_path / "other", config(), 2)
    assert "nothing says of which run" in refusal(tmp_path / "other", settings)


def test_a_moved_run_stays_itself_and_a_copy_becomes_another(tmp_path: Path) -> None:
    first = begin(tmp_path / "a", config(), 3)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert take_place(tmp_path / "moved", config(), ()).id == first.id
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    found = standing(tmp_path / "copy", config())
    assert "is a copy of" in found.notes[0]
    copy = take_place(tmp_path / "copy", config(), ())
    assert copy.id != first.id and copy.owns(first.id), "it goes on from what it was copied with"
    assert not first.owns(copy.id)
    assert take_place(tmp_path / "moved", config(), ()).id == first.id
    assert take_place(tmp_path / "copy", config(), ()) == copy and not standing(tmp_path / "copy", config()).notes
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert take_place(tmp_path / "link", config(), ()).id == first.id, "another name of the same folder is no copy"


def test_a_copy_does_not_share_a_place_outside(tmp_path: Path) -> None:
    shared = config(tmp_path / "ckpt")
    begin(tmp_path / "a", shared, 3)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert f"{tmp_path / 'copy'} is a copy of {tmp_path / 'a'}" in refusal(tmp_path / "copy", shared)
    linked = tmp_path / "b"
    linked.mkdir()
    (linked / "checkpoints").symlink_to(tmp_path / "ckpt")  # a folder's own name for a place that is not in it
    assert "belongs to the run" in standing(linked, config()).problem
    shutil.copytree(tmp_path / "ckpt" / "step-00000003", tmp_path / "own" / "step-00000003")
    assert refusal(tmp_path / "copy", config(tmp_path / "own")) == ""
    assert take_place(tmp_path / "copy", config(tmp_path / "own"), ()).owns(run_id_at(tmp_path / "own/step-00000003"))


def test_a_lost_folder_is_made_anew_at_its_path(tmp_path: Path) -> None:
    shared = config(tmp_path / "ckpt")
    first = begin(tmp_path / "a", shared, 3)
    shutil.rmtree(tmp_path / "a")
    assert refusal(tmp_path / "a", shared) == ""
    assert "already has the checkpoint" in refusal(tmp_path / "a", shared, "never")
    assert "train.seed" in refusal(tmp_path / "a", config(tmp_path / "ckpt", "train.seed=5"))
    again = begin(tmp_path / "a", shared)
    assert again.id != first.id and again.owns(first.id)
    owner = owner_of(tmp_path / "ckpt")
    assert owner is not None and owner.id == again.id


def test_a_new_place_without_the_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "a", config(tmp_path / "old"), 3)
    said = refusal(tmp_path / "a", config(tmp_path / "new"))
    assert "holds no checkpoint of this run" in said and "step-00000003" in said
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert refusal(tmp_path / "a", config(tmp_path / "new")) == ""


def test_an_address_has_an_owner_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.register()
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    shared = config("objects://bucket/run", "checkpoint.timeout_s=2")
    (tmp_path / "a").mkdir()
    own = take_place(tmp_path / "a", shared, ())
    for resume in ("auto", "never"):
        said = refusal(tmp_path / "b", shared, resume)
        assert f"belongs to the run {tmp_path / 'a'} (id {own.id}" in said, resume
    assert take_place(tmp_path / "a", shared, ()) == own


def test_pruning_leaves_what_is_another_runs(tmp_path: Path) -> None:
    own, other = Identity("1" * 16, "/a"), Identity("2" * 16, "/b")
    for step, whose in ((1, own), (2, other), (3, own), (4, None), (5, own), (9, other), (10, own)):
        saved(tmp_path, step, config(), whose)
    gone = prune(tmp_path, 2, 5, owns=own.owns)
    assert [path.name[-2:] for path in gone] == ["01", "03", "10"]
    assert [path.name[-2:] for path in committed(tmp_path)] == ["02", "04", "05", "09"]


def test_prune_deletes_nothing_in_another_runs_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import main

    shared = config(tmp_path / "ckpt")
    begin(tmp_path / "a", shared, 3, 6, 9)
    RunFolder(tmp_path / "b").create(dump(shared))  # as an older version let it begin there
    assert main(["checkpoint", "prune", str(tmp_path / "b"), "--keep", "1"]) == 2
    assert f"belongs to the run {tmp_path / 'a'}" in capsys.readouterr().err
    assert len(committed(tmp_path / "ckpt")) == 3
