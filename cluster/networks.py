"""Which of a machine's addresses its peers can reach: what the user names, else a subnet that every node has."""

import ipaddress
import json
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.ports import SIOCGIFADDR, interface_of, own_address

SIOCGIFNETMASK = 0x891B  # linux/sockios.h
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
GLOO_NAME, NCCL_NAME = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Attached:
    """One address of a machine: the interface's name and the address with its subnet, such as "10.0.0.3/24"."""

    name: str
    address: str

    @property
    def network(self) -> str:
        """The subnet, such as "10.0.0.0/24"."""
        return str(ipaddress.ip_interface(self.address).network)

    @property
    def host(self) -> str:
        """The address alone."""
        return str(ipaddress.ip_interface(self.address).ip)


@dataclass(frozen=True)
class Node:
    """What a machine tells the others: its name, its addresses, preferred ones first, and the user's variables."""

    hostname: str
    attached: tuple[Attached, ...]
    gloo: str = ""
    nccl: str = ""

    def text(self) -> str:
        """JSON for the other ranks."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_text(text: str) -> "Node":
        """The reverse of `text`."""
        fields = json.loads(text)
        return Node(**fields | {"attached": tuple(Attached(**one) for one in fields["attached"])})


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: an address of rank 0's node, and what each node gives Gloo as its interface, if known."""

    host: str
    interfaces: tuple[str | None, ...]


def this_node(environment: Mapping[str, str]) -> Node:
    """What this machine has, without loopback and link-local addresses; the default route's source comes first."""
    found = [one for one in [*_ipv4(), *_ipv6()] if _reaches_out(one.host)]
    default = own_address()
    ordered = tuple(sorted(found, key=lambda one: one.host != default))
    gloo, nccl = (environment.get(name, "").strip() for name in (GLOO_NAME, NCCL_NAME))
    return Node(socket.gethostname(), ordered, gloo, nccl)


def meeting(nodes: Sequence[Node], first: int) -> Meeting | str:
    """Chooses addresses for several nodes, from what each of them has; a problem's sentence where that cannot be.

    The user's GLOO_SOCKET_IFNAME, else NCCL_SOCKET_IFNAME, limits the choice on the nodes that have it. Among what is
    left, an address of the first node counts whose subnet all nodes have; without one, the nodes' preferred addresses,
    for networks that routers join. An address that several nodes have alike is a container bridge's and never counts.

    Args:
        first: the number of rank 0's node.
    """
    hosts = [one.host for node in nodes for one in {one.host: one for one in node.attached}.values()]
    usable = []
    for node in nodes:
        apart = [one for one in node.attached if hosts.count(one.host) == 1]
        wanted = _wanted(node, apart)
        variable, text = (GLOO_NAME, node.gloo) if node.gloo else (NCCL_NAME, node.nccl)
        if not wanted:
            have = ", ".join(f"{one.name} ({one.address})" for one in apart)
            if text and have:
                return f"{variable} = {text!r} names no interface of {node.hostname} that others reach; it has {have}"
            return (
                f"{node.hostname} has no address that the other nodes ({_others(nodes, node)}) reach, only loopback, "
                f"link-local or container bridges' ones; bring up an interface that joins the nodes"
            )
        usable.append(wanted)
    chosen = [candidates[0] for candidates in usable]
    for one in usable[first]:
        matches = [next((peer for peer in peers if peer.network == one.network), None) for peers in usable]
        if all(matches):
            chosen = [match for match in matches if match]
            chosen[first] = one
            break
    names = tuple(node.gloo or one.name or None for node, one in zip(nodes, chosen, strict=True))
    return Meeting(chosen[first].host, names)


def _wanted(node: Node, apart: list[Attached]) -> list[Attached]:
    """The addresses whose interfaces the user's variables allow, in the order of preference.

    Gloo's variable lists names. NCCL's lists prefixes, after "=" whole names, after "^" those that are not wanted
    (NCCL's documentation, "Environment Variables").
    """
    if node.gloo:
        names = [name.strip() for name in node.gloo.split(",")]
        return [one for name in names for one in apart if one.name == name]
    if not node.nccl:
        return apart
    exact = node.nccl.lstrip("^").startswith("=")
    words = [word.strip() for word in node.nccl.lstrip("^=").split(",") if word.strip()]

    def meant(name: str) -> bool:
        found = any(name == word if exact else name.startswith(word) for word in words)
        return found != node.nccl.startswith("^")

    return [one for one in apart if meant(one.name)]


def _others(nodes: Sequence[Node], node: Node) -> str:
    names = [one.hostname for one in nodes if one is not node]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _reaches_out(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)


def _ipv4() -> list[Attached]:
    if sys.platform != "linux":
        return [Attached(interface_of(own_address()) or "", f"{own_address()}/32")]
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                address = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
                mask = fcntl.ioctl(probe.fileno(), SIOCGIFNETMASK, request)[20:24]
            except OSError:  # an interface without an IPv4 address
                continue
            found.append(Attached(name, f"{socket.inet_ntoa(address)}/{int.from_bytes(mask).bit_count()}"))
    return found


def _ipv6(table: Path = IPV6_ADDRESSES) -> list[Attached]:
    """Rows of Linux's table: address, number of the interface, length of the prefix, scope, flags, name; in hex."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()]
    except OSError:
        return []
    return [Attached(row[5], f"{ipaddress.IPv6Address(int(row[0], 16))}/{int(row[2], 16)}") for row in rows]
