"""A machine that is about to go: who is told, and for whom it waits."""

import socket
from pathlib import Path

import pytest

from cluster import drain


def test_own_addresses() -> None:
    assert drain.is_own("127.0.0.1") and not drain.is_own("192.0.2.1")


def test_ranks_are_found_by_their_titles(tmp_path: Path) -> None:
    for pid, title in ((10, b"ray::RankActor.begin"), (11, b"ray::IDLE"), (12, b"vim\\0ray::RankActor")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(title)
    (tmp_path / "13").mkdir()
    assert drain.ranks_here(tmp_path) == [10]


def test_it_waits_for_ranks_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [[5], [5], []]
    monkeypatch.setattr(drain.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(drain, "ranks_here", lambda: left.pop(0))
    assert drain.wait_for_ranks(60.0) and left == []
    monkeypatch.setattr(drain, "ranks_here", lambda: [5])
    assert not drain.wait_for_ranks(0.0)


def test_nobody_to_tell(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert drain.main(["--address", address]) == 1
    assert f"{address} was not told" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        drain.main(["--address", "head"])
