"""Who may use a Ray cluster: refuses one that takes work from anybody, or whose token would travel readably.

Whoever reaches a port of a Ray without token authentication runs code on all of its nodes (CVE-2023-48022). Whether a
cluster asks for its token cannot be told from this side's settings, so it is asked without one.
"""

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ASK_S = 5.0
_FRAME_BYTES = 9
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_ADVICE = (
    "start it with a token (launch/jobs/ray_cluster.sh token and head, or RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
    "in the environment of every `ray start`), or give --insecure if nobody else reaches it"
)


def address_problem(address: str) -> tuple[str, ...]:
    """Why this is no address of a dashboard; nothing when it is one, of the form http://HOST:PORT or https://HOST."""
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:  # its port is no number, or its brackets do not match
        known = False
    if not known or parts.query or parts.fragment:
        return (
            f"--address {address} is not the address of a Ray dashboard; give scheme, host and port, as in "
            "http://127.0.0.1:8265",
        )
    if parts.username is not None or parts.password is not None:
        return ("--address holds a login; give http://HOST:PORT alone, and the cluster's token in RAY_AUTH_TOKEN_PATH",)
    return ()


def dashboard_problems(address: str) -> list[str]:
    """Every reason not to send a job to a dashboard; nothing where it does not answer, which sending will report.

    Args:
        address: "http://host:8265".
    """
    if problem := address_problem(address):
        return list(problem)
    parts = urlsplit(address)
    host, found = parts.hostname or "", []
    if parts.scheme == "http" and not is_loopback(host):
        found.append(
            f"--address {address} is not on loopback, and over http the token and the code travel readably; let the "
            f"dashboard listen on its own loopback, run `ssh -L 8265:127.0.0.1:8265 {host}` and give "
            "--address http://127.0.0.1:8265, or use https, or give --insecure"
        )
    elif is_loopback(host) and listens_everywhere(parts.port or 80):
        found.append(
            f"the Ray dashboard at {address} listens on all interfaces of this machine; start it with "
            "--dashboard-host 127.0.0.1, or give --insecure"
        )
    status = _status_without_token(f"{address.rstrip('/')}/api/version")
    if status not in (None, 401, 403):
        found.append(
            f"the Ray cluster at {address} takes jobs without a token (status {status}): whoever reaches it runs code "
            f"on its nodes; {_ADVICE}"
        )
    return found


def cluster_problem(address: str) -> str:
    """Why a Ray cluster must not be joined, "" where it asks for a token.

    Args:
        address: of its GCS, "host:port".

    Raises:
        OSError: it does not answer.
    """
    if os.environ.get("RAY_USE_TLS") in ("1", "true"):
        return ""  # both sides show certificates; a connection without one gets no answer at all
    if not answers_without_token(address):
        return ""
    return f"the Ray cluster at {address} asks nobody for a token: whoever reaches it runs code on its nodes; {_ADVICE}"


def gcs_address_problem(address: str) -> str:
    """Why RAY_ADDRESS cannot be where a driver joins a cluster, "" where it can: host:port, "auto" or nothing."""
    if address in ("", "auto"):
        return ""
    give = "give RAY_ADDRESS=HEAD:6379 (host and port of the cluster's GCS, see `ray start --head --port`)"
    scheme, found, rest = address.partition("://")
    if found and scheme in ("http", "https"):
        host = rest.split("/")[0].rpartition(":")[0] or rest
        return (
            f"RAY_ADDRESS = {address} is the address of a dashboard, which takes jobs: use `trimtab submit CONFIG "
            f"--address {address}`, or {give.replace('HEAD', host)}"
        )
    if found and scheme == "ray":
        host = rest.split("/")[0].rpartition(":")[0] or rest
        return (
            f"RAY_ADDRESS = {address} is the address of the Ray client's server, which cannot place ranks; "
            f"{give.replace('HEAD', host)}"
        )
    if found:
        return f"RAY_ADDRESS = {address} is of an unknown kind; {give}"
    if address == "local":
        return (
            "RAY_ADDRESS = local would start a Ray of its own that asks nobody for a token; use `trimtab submit` "
            "without --address, which starts one with a token, or --launcher local"
        )
    host, _, port = address.rpartition(":")
    if not host or (":" in host and not host.startswith("[")):
        return f"RAY_ADDRESS = {address} has no port; give RAY_ADDRESS={address}:6379, or the port of its GCS"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        return f"RAY_ADDRESS = {address}: {port!r} is not a port from 1 to 65535; {give}"
    return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def listens_everywhere(port: int) -> bool:
    """Whether a program of this machine listens on a TCP port of all interfaces; False where Linux does not tell."""
    for table, anywhere in (("tcp", "0" * 8), ("tcp6", "0" * 32)):
        try:
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            local, state = row.split()[1], row.split()[3]
            if state == "0A" and local == f"{anywhere}:{port:04X}":
                return True
    return False


def _status_without_token(url: str) -> int | None:
    """The status of a request without credentials; None where nothing answers.

    It goes the way that the job's requests will go (`web_proxies.direct_requests`): over http without a proxy.
    """
    handlers = [urllib.request.ProxyHandler({})] if url.startswith("http:") else []
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(url, timeout=ASK_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def answers_without_token(address: str, timeout_s: float = ASK_S) -> bool:
    """Whether a GCS answers a question that came without a token.

    One call over HTTP/2, by hand: importing Ray in a process of its own, with authentication off, takes seconds. An
    answer is a frame of data on the call's stream; a refusal has headers only.

    Raises:
        OSError: nothing answers there, or it does not speak HTTP/2.
    """
    host, _, port = address.rpartition(":")
    fields = {
        ":method": "POST", ":scheme": "http", ":path": _QUESTION, ":authority": address,
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, b"")
            + _frame(_HEADERS, _END_HEADERS, 1, block)
            + _frame(_DATA, _END_STREAM, 1, bytes(5))  # an empty message, not compressed
        )
        for kind, flags, stream, body in _frames(connection):
            if kind == _SETTINGS and not flags & _ACK:
                connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif stream == 1 and kind == _DATA and body:
                return True
            elif kind == _GOAWAY or (stream == 1 and (kind == _RST_STREAM or flags & _END_STREAM)):
                return False
    raise ConnectionError(f"{address} ended the connection without an answer")


def _text(text: str) -> bytes:
    assert len(text) < 127, f"{text!r} is too long for a length of one byte"
    return bytes([len(text)]) + text.encode("ascii")


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """(kind, flags, stream, body) of each frame until the other side ends the connection."""
    with connection.makefile("rb") as reader:
        while len(head := reader.read(_FRAME_BYTES)) == _FRAME_BYTES:
            body = reader.read(int.from_bytes(head[:3], "big"))
            yield head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFFFFFF, body
