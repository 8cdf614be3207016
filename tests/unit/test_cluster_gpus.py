"""Each rank's own GPU, whatever part of a node's GPUs its process sees; torch is told what it shows."""

from types import SimpleNamespace

import pytest
import torch

from cluster.gpus import own_gpus, visible_gpus, without_gpu
from parallel.ranks import choose_device


def show(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=uuids[number]))


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        (["ab", "ab"], [0, 1]),
        (["a", "b", "c"], [0, 0, 0]),
        (["a", "a"], [0, None]),
        (["ab", "ab", "cd", "cd"], [0, 1, 0, 1]),
        (["", ""], [None, None]),
        (["ab", "ab", "ab"], [0, 1, None]),
    ],
)
def test_own_gpus(seen: list[str], chosen: list[int | None]):
    assert own_gpus(seen) == chosen
    assert bool(without_gpu([seen], [list(range(len(seen)))])) == (None in chosen)


def test_ranks_that_share_are_named():
    text = without_gpu([["a", "b"], ["c", "c"], [""]], [[0, 1], [2, 3], [4]])
    assert text == "rank 3 shares 1 with ranks 2, 3; rank 4 sees none"


def test_what_torch_shows(monkeypatch: pytest.MonkeyPatch):
    show(monkeypatch, "GPU-1", "GPU-2")
    assert visible_gpus("auto") == ["GPU-1", "GPU-2"] and visible_gpus("cpu") == []
    show(monkeypatch)
    assert visible_gpus("gpu") == []


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (1, "cpu"), (2, "cuda"), (8, "cuda")])
def test_two_workers_on_one_machine_take_gpus_only_where_both_get_one(monkeypatch, capsys, count: int, expected: str):
    show(monkeypatch, *(str(number) for number in range(count)))
    devices = [choose_device("auto", rank, workers=2) for rank in range(2)]
    assert [one.type for one in devices] == [expected] * 2
    assert expected == "cpu" or [one.index for one in devices] == [0, 1]
    said = capsys.readouterr().out
    assert said.count("shows 1 GPU") == (1 if count == 1 else 0)  # rank 0 speaks
    if count < 2:
        with pytest.raises(RuntimeError, match="has no GPU of its own"):
            choose_device("gpu", 1, workers=2)
