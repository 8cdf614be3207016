"""An HTTP server of a folder that misbehaves as told, for the tests of remote data."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves a folder on a free loopback port, with ranges, and misbehaves as told.

    faults: of each request, drawn from these; "ok", "503", "hang", "cut" (half of the body), "flip" (a wrong byte) and
    "slow". held: names whose requests wait until `release` is set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, ["ok"]
        self.requests: Counter[tuple[str, str]] = Counter()
        self.draw = random.Random(0)
        self.closing = threading.Event()
        self.held: set[str] = set()
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def do_HEAD(self) -> None:
                outer.answer(self)

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        fault = self.draw.choice(self.faults)
        name = request.path.lstrip("/")
        self.requests[name, fault] += 1
        path = self.folder / name
        if name in self.held:
            self.release.wait(20)
        if fault == "slow":
            time.sleep(0.03)
        if fault == "hang":
            self.closing.wait(1.5)
            return
        if fault == "503" or not path.is_file():
            request.send_response(503 if fault == "503" else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body, status = path.read_bytes(), 200
        if wanted := request.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        if fault == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def close(self) -> None:
        self.closing.set()
        self.release.set()
        self.http.shutdown()
        self.http.server_close()
