"""Keeps requests to a Ray cluster from being sent to a web proxy, and from being signed with another login.

A proxy that the environment names (`http_proxy` and the like) reads a request over http whole, the token included, and
cannot reach this machine's loopback. requests and urllib read the names of hosts without a proxy from `no_proxy` or,
where that is not set, from `NO_PROXY`; so both are set. requests also replaces a given token by a login that ~/.netrc
names for the host.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

# This machine's loopback, and where a cloud's machine asks about itself, as Ray does at its start: a proxy would answer
# for another machine.
DIRECT = ("127.0.0.1", "localhost", "::1", "127.0.0.0/8", "169.254.169.254", "metadata.google.internal")
NAMES = ("no_proxy", "NO_PROXY")


def without_proxies(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """The values of `no_proxy` and `NO_PROXY` with `DIRECT` and `hosts` added to what they hold."""
    known = ",".join(filter(None, [environment.get(name, "") for name in NAMES]))
    given = [host.strip() for host in known.split(",") if host.strip()]
    if "*" in given:  # no host has a proxy; the star counts only by itself
        return dict.fromkeys(NAMES, "*")
    return dict.fromkeys(NAMES, ",".join(dict.fromkeys([*given, *DIRECT, *filter(None, hosts)])))


@contextlib.contextmanager
def direct_requests(address: str) -> Iterator[None]:
    """Inside, this process's requests to a dashboard go where the address says and carry the token that was given.

    Args:
        address: "http://host:8265"; a host behind https keeps the environment's proxy, which sees no content.
    """
    parts = urlsplit(address)
    hosts = [parts.hostname or ""] if parts.scheme == "http" else []
    changes: dict[str, str | None] = {**without_proxies(os.environ, *hosts), "NETRC": os.devnull}
    with changed_environment(changes):
        yield


@contextlib.contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, these variables of the process have these values, or are not set where None."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
