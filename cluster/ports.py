"""Finds a TCP port for a rendezvous and keeps it from others until it is used; finds the interface of an address."""

import random
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

LOWEST_PORT = 15000
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
SIOCGIFADDR = 0x8915  # linux/sockios.h


class PortHold:
    """A port that is bound, but not listened on, by this object.

    The number lies below the system's ephemeral range, so that no outgoing connection takes it by chance. The socket
    is bound without SO_REUSEADDR, which fails when anybody else has the port, and gets the option afterwards: Linux
    then lets the store's own socket (which sets it) bind beside this one and listen, while every other search of this
    kind finds the port taken. What remains is a foreign program that asks for this very number with SO_REUSEADDR in
    the seconds before the store listens; the store's bind then fails with "address already in use". Other systems do
    not share a port like that: there `release` has to come first, and a race of milliseconds remains.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in _candidates():
            held = socket.socket(family, socket.SOCK_STREAM)
            try:
                held.bind((host, port))
            except OSError as error:
                held.close()
                if isinstance(error, PermissionError) or error.errno is None:
                    raise
                continue
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.host, self.port, self._socket = host, port, held
            return
        raise OSError(f"no free TCP port between {LOWEST_PORT} and {ephemeral_start() - 1} on {host}")

    @property
    def address(self) -> str:
        """The rendezvous address, "tcp://host:port"."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def hand_over(self) -> None:
        """Called right before the entry starts: lets go where the port cannot be shared."""
        if sys.platform != "linux":
            self.release()

    def release(self) -> None:
        """Gives the port up."""
        self._socket.close()

    def __enter__(self) -> "PortHold":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def ephemeral_start() -> int:
    """The first port that the system gives to outgoing connections."""
    try:
        return int(EPHEMERAL_RANGE.read_text().split()[0])
    except OSError:
        return 49152


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that are free now, for a program that takes its ports as numbers."""
    holds = [PortHold(host) for _ in range(count)]
    for hold in holds:
        hold.release()
    return [hold.port for hold in holds]


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address; None where the system does not tell."""
    if sys.platform != "linux":
        return "lo0" if address.startswith("127.") and sys.platform == "darwin" else None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def own_address() -> str:
    """The address by which other machines most likely reach this one: the source of its default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); connecting a datagram socket sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _candidates() -> Iterator[int]:
    # Systems that hand out almost everything (a range from 1024 or 9000 has been seen) leave too little room below.
    top = ephemeral_start()
    low, high = (LOWEST_PORT, top) if top > LOWEST_PORT + 1000 else (LOWEST_PORT, 32768)
    chooser = random.SystemRandom()  # the training's seed must not make two runs pick alike
    for _ in range(200):
        yield chooser.randrange(low, high)
