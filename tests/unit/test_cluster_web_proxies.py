"""Requests to a dashboard reach it: no web proxy, no other cluster, no login of ~/.netrc gets in between."""

import http.server
import os
import threading
import urllib.request

import pytest
import requests

from cluster import jobs
from cluster.web_proxies import changed_environment, direct_requests, without_proxies


@pytest.fixture
def server():
    """A server that notes (path or absolute address, Authorization) of every request."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0"}')

        def log_message(self, *arguments):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    made.asked, made.address = asked, f"http://127.0.0.1:{made.server_address[1]}"
    yield made
    made.shutdown()


@pytest.fixture
def proxy():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(502)

        do_CONNECT = do_GET

        def log_message(self, *arguments):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    made.asked, made.address = asked, f"http://127.0.0.1:{made.server_address[1]}"
    yield made
    made.shutdown()


@pytest.mark.parametrize("given", [{}, {"no_proxy": "example.org"}, {"NO_PROXY": "example.org"}, {"no_proxy": ""}])
def test_neither_requests_nor_urllib_ask_the_proxy(server, proxy, monkeypatch, tmp_path, given):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    token = {"Authorization": "Bearer of-the-cluster"}
    before = dict(os.environ)
    with direct_requests(server.address):
        requests.get(server.address, headers=token, timeout=5)
        urllib.request.urlopen(urllib.request.Request(server.address, headers=token), timeout=5).close()
    assert server.asked == [("/", "Bearer of-the-cluster")] * 2 and proxy.asked == []
    assert dict(os.environ) == before, "the user's settings are as they were"
    requests.get(server.address, headers=token, timeout=5)
    assert len(proxy.asked) == 1, "outside, the proxy is asked"


@pytest.mark.parametrize("variables", [("RAY_ADDRESS",), ("RAY_API_SERVER_ADDRESS",), jobs.OVERRIDES])
def test_rays_client_goes_to_the_address_that_was_checked(server, proxy, monkeypatch, variables):
    for name in jobs.OVERRIDES:
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, proxy.address)  # somebody else's dashboard
    with direct_requests(server.address):
        client = jobs._client(server.address, "of-the-cluster")
    assert client.get_address() == server.address and os.environ[variables[0]] == proxy.address
    assert {one[1] for one in server.asked} == {"Bearer of-the-cluster"} and proxy.asked == []


def test_a_client_that_went_elsewhere_is_not_used(server, monkeypatch):
    """If another variable led it away, no job would be sent."""
    import ray.job_submission

    made = ray.job_submission.JobSubmissionClient
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda address, headers: made(server.address))
    with (
        direct_requests("http://127.0.0.1:9"),
        pytest.raises(jobs.JobError, match=r"instead of http://127\.0\.0\.1:9; no"),
    ):
        jobs._client("http://127.0.0.1:9", None)


def test_a_dashboard_over_http_elsewhere_has_no_proxy_and_one_over_https_keeps_it():
    with direct_requests("http://10.1.2.3:8265"):
        assert "10.1.2.3" in os.environ["no_proxy"].split(",")
    with direct_requests("https://ray.example.org"):
        assert "ray.example.org" not in os.environ["no_proxy"]


def test_what_the_user_excluded_stays_excluded():
    names = without_proxies({"no_proxy": "a.org, b.org", "NO_PROXY": "c.org"})
    assert names["no_proxy"] == names["NO_PROXY"]
    assert names["no_proxy"].split(",")[:3] == ["a.org", "b.org", "c.org"]
    assert without_proxies({"no_proxy": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}


def test_variables_come_back_after_an_error(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(ValueError), changed_environment({"RAY_ADDRESS": None, "NOT_THERE": "1"}):
        assert "RAY_ADDRESS" not in os.environ and os.environ["NOT_THERE"] == "1"
        raise ValueError
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265" and "NOT_THERE" not in os.environ
