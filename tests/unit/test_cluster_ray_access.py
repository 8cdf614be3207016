"""Clusters that ask nobody for a token are told from those that do, by what they answer."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import ray_access
from cluster.ray_access import (
    answers_without_token,
    cluster_problem,
    dashboard_problems,
    is_loopback,
    listens_everywhere,
)

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
REFUSED = bytes([0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88])  # headers that end the stream
BEGUN = bytes([0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88])
ANSWER = bytes([0, 0, 5, 0, 0, 0, 0, 0, 1]) + bytes(5)
RESET = bytes([0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7])


@contextmanager
def gcs(*frames: bytes) -> Iterator[str]:
    """Something that takes one connection and answers with these frames; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                for frame in frames:
                    connection.sendall(frame)
                connection.settimeout(5)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(5)


def test_an_answer_is_data_and_a_refusal_is_not() -> None:
    with gcs(SETTINGS, BEGUN, ANSWER) as address:
        assert answers_without_token(address)
    for frame in (REFUSED, RESET):
        with gcs(SETTINGS, frame) as address:
            assert not answers_without_token(address)
    with gcs(SETTINGS, BEGUN, ANSWER) as address:
        problem = cluster_problem(address)
    assert "asks nobody for a token" in problem and "--insecure" in problem
    with gcs(SETTINGS, REFUSED) as address:
        assert cluster_problem(address) == ""


def test_silence_is_an_error_and_never_a_yes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError):
            answers_without_token(address, timeout_s=0.2)


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Gives `status` to whoever asks."""

    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def dashboard(status: int, host: str = "127.0.0.1") -> Iterator[int]:
    handler = type("Handler", (Dashboard,), {"status": status})
    with http.server.ThreadingHTTPServer((host, 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(("status", "refused"), [(401, False), (403, False), (200, True), (302, True), (500, True)])
def test_a_dashboard_that_does_not_ask_for_a_token(status: int, refused: bool) -> None:
    with dashboard(status) as port:
        problems = dashboard_problems(f"http://127.0.0.1:{port}")
    assert bool(problems) == refused
    assert not refused or ("without a token" in problems[0] and "--insecure" in problems[0])


def test_a_dashboard_on_all_interfaces() -> None:
    with dashboard(401, "0.0.0.0") as port:
        assert listens_everywhere(port)
        [problem] = dashboard_problems(f"http://127.0.0.1:{port}")
    assert "--dashboard-host 127.0.0.1" in problem


def test_a_dashboard_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ray_access, "_status_without_token", lambda url: asked.append(url) or 401)
    [problem] = dashboard_problems("http://10.1.2.3:8265/")
    assert "ssh -L 8265:127.0.0.1:8265 10.1.2.3" in problem
    assert dashboard_problems("https://ray.example.org") == []
    assert asked == ["http://10.1.2.3:8265/api/version", "https://ray.example.org/api/version"]
    assert "not the address" in dashboard_problems("10.1.2.3:8265")[0]


def test_a_dashboard_that_does_not_answer_is_left_to_the_submission() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert dashboard_problems(f"http://127.0.0.1:{port}") == []


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.0.1")))
    assert not any(map(is_loopback, ("10.0.0.1", "localhost.evil.org", "127.evil.org", "0.0.0.0", "1270.0.0.1")))
