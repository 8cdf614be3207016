"""A held port is nobody else's until the rendezvous listens on it."""

import errno
import socket
import sys
from datetime import timedelta

import pytest

from cluster import ports
from cluster.ports import PortHold, ephemeral_start, free_ports, interface_of, own_address


def test_holds_never_collide_and_lie_below_the_ephemeral_range():
    holds = [PortHold("127.0.0.1") for _ in range(20)]
    try:
        numbers = [hold.port for hold in holds]
        assert len(set(numbers)) == 20
        assert all(ports.LOWEST_PORT <= number < ephemeral_start() for number in numbers)
        assert holds[0].address == f"tcp://127.0.0.1:{numbers[0]}"
    finally:
        for hold in holds:
            hold.release()


def test_another_search_finds_a_held_port_taken(monkeypatch):
    with PortHold("127.0.0.1") as hold:
        monkeypatch.setattr(ports, "_candidates", lambda: iter([hold.port]))
        with pytest.raises(OSError, match="no free TCP port"):
            PortHold("127.0.0.1")


def test_a_port_in_use_is_passed_over(monkeypatch):
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        free = free_ports(1)[0]
        monkeypatch.setattr(ports, "_candidates", lambda: iter([server.getsockname()[1], free]))
        with PortHold("127.0.0.1") as hold:
            assert hold.port == free


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a listener bind beside the hold")
def test_the_store_listens_on_the_port_while_it_is_held():
    from torch.distributed import TCPStore

    with PortHold("127.0.0.1") as hold:
        hold.hand_over()
        store = TCPStore("127.0.0.1", hold.port, 1, is_master=True, timeout=timedelta(seconds=10))
        store.set("k", "v")
        assert store.get("k") == b"v"
        with pytest.raises(OSError) as caught, socket.socket() as other:
            other.bind(("127.0.0.1", hold.port))
        assert caught.value.errno == errno.EADDRINUSE


def test_interfaces():
    if sys.platform == "linux":
        assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
    assert socket.inet_aton(own_address())
