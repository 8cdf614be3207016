"""Checkpoints at an address: what is there, what counts, and what a storage may do wrong."""

import errno
from pathlib import Path

import pytest
import torch

from data import storage
from parallel import remote, retention
from parallel.remote import RemoteError, RemotePath, address_problems, is_remote
from parallel.roots import aside, committed, drafts, new_name, newest_step, readable, root_of, step_of
from parallel.safetensors_file import SafetensorsReader, file_size, sha256, write
from tests import object_store
from tests.object_store import ObjectStore


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """An empty address, with a short deadline."""
    object_store.register()
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv("OBJECT_STORE", str(tmp_path / "objects"))
    return RemotePath("objects://bucket/run", 2.0)


def failing(monkeypatch: pytest.MonkeyPatch, operation: str, errors: list[Exception]) -> list[str]:
    """From now on an operation raises these, one after the other; gives the names of the objects it was asked for."""
    asked: list[str] = []

    def before(called: str, name: str) -> None:
        if called == operation:
            asked.append(name)
            if errors:
                raise errors.pop(0)

    monkeypatch.setattr(ObjectStore, "before", staticmethod(before))
    return asked


def put(root: RemotePath, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(name.encode())


def test_files(root: RemotePath) -> None:
    put(root, "a/x", "a/y", "b")
    assert root.files() == {"a/x": 3, "a/y": 3, "b": 1}
    assert ((root / "a").files(), (root / "a" / "x").read_text()) == ({"x": 3, "y": 3}, "a/x")
    assert (root / "a" / "x").read_range(1, 3) == b"/x" and (root / "a" / "x").size() == 3
    assert (root / "nothing").size() is None and (root / "nothing").files() == {}
    assert (root / "a" / "x").name == "x" and (root / "a" / "x").parent == root / "a"
    assert (root / "b").modified() is not None
    with pytest.raises(FileNotFoundError):
        (root / "nothing").read_bytes()
    (root / "a").remove_tree()
    (root / "a" / "x").unlink()
    assert root.files() == {"b": 1}


def test_a_listing_is_asked_for_afresh(root: RemotePath) -> None:
    assert root.files() == {} and root.files() == {}
    ObjectStore.file("bucket/run/step-00000010/COMMIT").write_text("by another process")
    assert [path.name for path in committed(root)] == ["step-00000010"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "s3://elsewhere/x"])
def test_no_name_leads_out(root: RemotePath, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        root / name


def test_what_fails_is_tried_again(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = failing(monkeypatch, "write", [OSError("503"), ConnectionError("reset")])
    tensors = [("a", torch.arange(1000.0)), ("b", torch.ones(3))]
    halves: list[int] = []
    told = write(root / "f", tensors, lambda: halves.append(1))
    assert len(asked) == 6 and halves == [1]
    assert told == {"size": file_size(root / "f"), "sha256": sha256(root / "f")}
    failing(monkeypatch, "cat_file", [OSError("503"), TimeoutError("slow")])
    reader = SafetensorsReader(root / "f")
    assert reader.flat_slice("a", 10, 13).tolist() == [10.0, 11.0, 12.0]
    assert reader.flat_slice("b", 0, 3).tolist() == [1.0, 1.0, 1.0]


def test_the_deadline_is_kept_and_says_what_happened_last(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "open", [OSError("503 of the store")] * 1000)
    with pytest.raises(RemoteError, match=r"not done within 0\.3 s .*503 of the store.*checkpoint\.timeout_s"):
        RemotePath("objects://bucket/run", 0.3).__truediv__("f").write_bytes(b"x")


@pytest.mark.parametrize("error", [PermissionError("no"), OSError(errno.ENOSPC, "full")])
def test_what_will_not_get_better_is_not_tried_again(
    root: RemotePath, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    asked = failing(monkeypatch, "open", [error] * 9)
    with pytest.raises(OSError):
        (root / "f").write_bytes(b"x")
    assert len(asked) == 1


def test_a_storage_that_does_not_answer_is_not_an_empty_one(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    short = RemotePath(root.address, 0.2)
    failing(monkeypatch, "find", [OSError("503")] * 1000)
    for ask in (committed, drafts, newest_step, readable, lambda place: new_name(place, 1)):
        with pytest.raises(RemoteError):
            ask(short)


def test_what_is_published_at_an_address(root: RemotePath) -> None:
    put(root, *(f"step-00000010/{name}" for name in ("rank-00000.safetensors", "manifest.json", "COMMIT")))
    put(root, "step-00000009/COMMIT", "step-00000100/COMMIT", "step-00000011/manifest.json", "notes/COMMIT", "COMMIT")
    assert [path.name for path in committed(root)] == ["step-00000009", "step-00000010", "step-00000100"]
    assert [path.name for path in drafts(root)] == ["step-00000011"]
    assert (new_name(root, 10), new_name(root, 11), new_name(root, 12)) == (
        "step-00000010.1", "step-00000011.1", "step-00000012",
    )  # fmt: skip
    put(root, "step-00000010.1/manifest.json", "step-00000010.2/COMMIT", "step-00000010.10/x")
    assert [path.name for path in committed(root)] == ["step-00000009", "step-00000010.2", "step-00000100"]
    assert [path.name for path in drafts(root)] == [
        "step-00000010", "step-00000010.1", "step-00000010.10", "step-00000011",
    ]  # fmt: skip
    assert new_name(root, 10) == "step-00000010.11" and newest_step(root) == 100
    assert step_of(root / "step-00000010.2") == 10


def test_pruning_at_an_address(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, *(f"step-{step:08d}/{name}" for step in (10, 20, 30, 40) for name in ("COMMIT", "manifest.json")))
    put(root, "step-00000030.1/COMMIT", "step-00000020.1/manifest.json", "notes")
    removed = failing(monkeypatch, "rm_file", [])
    assert [path.name for path in retention.prune(root, 1, 30, 20)] == ["step-00000010", "step-00000040"]
    assert sorted(root.files()) == [
        "notes", "step-00000020/COMMIT", "step-00000020/manifest.json", "step-00000030.1/COMMIT",
    ]  # fmt: skip
    gone = [name for name in removed if "step-00000010" in name]
    assert gone[0].endswith("COMMIT"), "first it is no checkpoint any more, then it goes"
    assert retention.recover(root) == []


def test_a_checkpoint_between_two_renames_counts(tmp_path: Path) -> None:
    for name in ("step-00000010", ".step-00000010.old", ".step-00000020.old", ".step-00000030.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT").write_text("x")
    (tmp_path / ".step-00000040.old").mkdir()
    assert [path.name for path in committed(tmp_path)] == ["step-00000010"]
    assert [path.name for path in readable(tmp_path)] == ["step-00000010", ".step-00000020.old"]
    assert newest_step(tmp_path) == 20 and step_of(tmp_path / ".step-00000020.old") == 20
    assert [path.name for path in aside(tmp_path)] == [".step-00000010.old", ".step-00000020.old"]
    assert [path.name for path in retention.recover(tmp_path)] == ["step-00000020"]
    assert readable(tmp_path / "nothing") == []


def test_addresses(tmp_path: Path) -> None:
    assert is_remote("s3://b/x") and not is_remote("file:///x") and not is_remote("/x")
    assert root_of("file:///tmp/x", 1.0) == Path("/tmp/x") and isinstance(root_of("s3://b/x", 1.0), RemotePath)
    for good in ("s3://b/x", "gs://b/x", "runs/x", "abfs://c@a.dfs.core.windows.net/x", ""):
        assert address_problems("checkpoint.dir", good) == []
    for bad in ("https://h/x", "simplecache::s3://b/x", "pipe:cat", "reference://x", "dask://x", "S3://b"):
        [problem] = address_problems("checkpoint.dir", bad)
        assert problem.startswith(f"checkpoint.dir = {bad!r}")
    with pytest.raises(RemoteError, match="nosuchprotocol"):
        RemotePath("nosuchprotocol://x", 1.0).files()


def test_data_and_checkpoints_refuse_the_same_kinds_of_address() -> None:
    """The rooms may not import each other, so the rule stands in both."""
    assert remote.REFUSED == storage.REFUSED
