"""Virtual ranks: what happens before their threads begin."""

import threading

import pytest

from parallel import threads


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mkl_has_settled_before_threads_multiply(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    order: list[str] = []
    monkeypatch.setattr(threads, "settle_mkl", lambda: order.append(f"settle on {threading.current_thread().name}"))

    def work(world: threads.VirtualWorld, rank: int) -> int:
        order.append("work")
        return rank

    assert threads.run_virtual_ranks(size, work) == list(range(size))
    assert order == [f"settle on {threading.current_thread().name}", *["work"] * size]
