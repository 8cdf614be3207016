"""Where the ranks of several machines meet: what the user names, else a subnet that all have, else a refusal."""

import pytest

from cluster import networks
from cluster.networks import Attached, Meeting, Node, meeting, this_node


def node(name: str, *addresses: str, gloo: str = "", nccl: str = "") -> Node:
    """A node from texts like "eth0 10.0.0.1/24"."""
    return Node(name, tuple(Attached(*text.split()) for text in addresses), gloo, nccl)


MANAGED = ("eth0 192.168.{0}.1/24", "docker0 172.17.0.1/16", "fast0 10.9.0.{0}/24")


def pair(**options: str) -> list[Node]:
    """Two nodes whose default routes lie on networks of their own; fast0 joins them."""
    return [node(f"host{n}", *(text.format(n) for text in MANAGED), **options) for n in (1, 2)]


@pytest.mark.parametrize(
    ("nodes", "first", "expected"),
    [
        (pair(), 0, Meeting("10.9.0.1", ("fast0", "fast0"))),
        (pair(), 1, Meeting("10.9.0.2", ("fast0", "fast0"))),
        (pair(gloo="eth0"), 0, Meeting("192.168.1.1", ("eth0", "eth0"))),
        (pair(gloo="fast0", nccl="eth"), 0, Meeting("10.9.0.1", ("fast0", "fast0"))),
        (pair(gloo="eth0,fast0"), 0, Meeting("10.9.0.1", ("eth0,fast0", "eth0,fast0"))),
        (pair(nccl="eth"), 0, Meeting("192.168.1.1", ("eth0", "eth0"))),
        (pair(nccl="^eth,docker"), 0, Meeting("10.9.0.1", ("fast0", "fast0"))),
        (pair(nccl="=eth0"), 0, Meeting("192.168.1.1", ("eth0", "eth0"))),
        (pair(nccl="^=fast0"), 0, Meeting("192.168.1.1", ("eth0", "eth0"))),
        # Only IPv6; only one node named; routed networks; interfaces that are called otherwise on each node.
        ([node("a", "ib0 fd00::1/64"), node("b", "ib1 fd00::2/64")], 0, Meeting("fd00::1", ("ib0", "ib1"))),
        ([pair(gloo="fast0")[0], pair()[1]], 1, Meeting("10.9.0.2", ("fast0", "fast0"))),
        ([node("a", "e 10.0.0.1/32"), node("b", "f 10.0.1.2/32")], 0, Meeting("10.0.0.1", ("e", "f"))),
    ],
)
def test_the_address_of_the_meeting(nodes: list[Node], first: int, expected: Meeting):
    assert meeting([Node.of_text(one.text()) for one in nodes], first) == expected


@pytest.mark.parametrize(
    ("nodes", "parts"),
    [
        ([node("a"), node("b", "e 10.0.0.1/24")], ("a has no address", "(b)", "loopback")),
        ([node("a", "docker0 172.17.0.1/16"), node("b", "docker0 172.17.0.1/16")], ("a has no address", "bridges")),
        (pair(gloo="nope0"), ("GLOO_SOCKET_IFNAME = 'nope0'", "host1", "fast0 (10.9.0.1/24)")),
        (pair(nccl="=fast"), ("NCCL_SOCKET_IFNAME = '=fast'", "host1", "eth0 (192.168.1.1/24)")),
    ],
)
def test_refusals_name_the_host_and_what_it_has(nodes: list[Node], parts: tuple[str, ...]):
    problem = meeting(nodes, 0)
    assert isinstance(problem, str) and all(part in problem for part in parts)


def test_what_this_machine_has(tmp_path, monkeypatch):
    table = tmp_path / "if_inet6"
    table.write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe800000000000000000000000000001 02 40 20 80     eth0\n"
        "fd000000000000000000000000000007 02 40 00 80     eth0\n"
    )
    monkeypatch.setattr(networks, "_ipv6", lambda read=networks._ipv6: read(table))
    monkeypatch.setattr(networks, "_ipv4", lambda: [Attached("lo", "127.0.0.1/8"), Attached("eth0", "10.0.0.3/24")])
    found = this_node({"GLOO_SOCKET_IFNAME": " eth0 "})
    assert found.attached == (Attached("eth0", "10.0.0.3/24"), Attached("eth0", "fd00::7/64"))
    assert found.gloo == "eth0" and found.attached[0].network == "10.0.0.0/24"


def test_real_addresses_are_read():
    assert all(one.host and one.network for one in this_node({}).attached)
    assert Attached("lo", "127.0.0.1/8") in networks._ipv4() or networks.sys.platform != "linux"
