"""Machines with addresses of their own on one machine: network namespaces on one bridge."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

NETWORK = "10.99.7."


def problem() -> str:
    """Why this machine cannot have them, "" where it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Namespaces(2) as machines:
            machines.run(1, ["true"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"this machine does not allow network namespaces: {detail.strip()}"
    return ""


class Namespaces:
    """`count` machines, the first of which holds the bridge; use as a context manager."""

    def __init__(self, count: int) -> None:
        mark = secrets.token_hex(3)
        self.names = [f"tt{mark}-{number}" for number in range(count)]

    def address(self, number: int) -> str:
        """Of a machine."""
        return f"{NETWORK}{number + 1}"

    def command(self, number: int, words: Sequence[str]) -> list[str]:
        """What runs a command on a machine."""
        return ["ip", "netns", "exec", self.names[number], *words]

    def run(self, number: int, words: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        """Runs a command on a machine and waits for it."""
        return subprocess.run(self.command(number, words), capture_output=True, text=True, timeout=60, **options)

    def start(self, number: int, words: Sequence[str], environment: Mapping[str, str], log: Any) -> subprocess.Popen:
        """Starts a command on a machine, in a session of its own."""
        return subprocess.Popen(
            self.command(number, words), env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def link(self, number: int, state: str) -> None:
        """Pulls a machine's cable ("down") or plugs it in again ("up")."""
        _ip("-n", self.names[0], "link", "set", f"port{number}", state)

    def __enter__(self) -> "Namespaces":
        first = self.names[0]
        try:
            for number, name in enumerate(self.names):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                if number == 0:
                    _ip("-n", first, "link", "add", "eth0", "type", "bridge")
                else:
                    _ip(
                        "-n",
                        first,
                        "link",
                        "add",
                        f"port{number}",
                        "type",
                        "veth",
                        "peer",
                        "name",
                        "eth0",
                        "netns",
                        name,
                    )
                    _ip("-n", first, "link", "set", f"port{number}", "master", "eth0", "up")
                _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
