"""A web server on this machine that fails in every way a download may meet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kmine.io import download


class Server(ThreadingHTTPServer):
    """Serves `content` under any name.

    `breaks` lists after how many bytes each answer ends early, `statuses` what is answered instead (the last one for
    ever), `ranges` what was asked for.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.breaks: list[int] = []
        self.statuses: list[int] = []
        self.ranges: list[str | None] = []
        self.knows_range = True
        self.says_length = True
        self.shift = 0
        """By how many bytes a partial answer begins too early; it says so."""

    def url(self, name: str) -> str:
        """Where it serves a file of that name."""
        return f"http://127.0.0.1:{self.server_port}/{name}"

    @property
    def starts(self) -> list[int]:
        """First bytes asked for, answer by answer."""
        return [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for asked in self.ranges]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        assert self.headers["Accept-Encoding"] == "identity", "offsets must count the bytes of the file itself"
        server.ranges.append(asked)
        start = server.starts[-1] if server.knows_range else 0
        status = server.statuses[0] if server.statuses else 0
        server.statuses = server.statuses[1:] or server.statuses
        if status >= 400 or (start and start >= len(server.content)):
            self.send_error(status if status >= 400 else 416)
            return
        start = max(start - server.shift, 0) if start else 0
        body = server.content[start:]
        self.send_response(206 if asked and server.knows_range else 200)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        if server.shift:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *_args) -> None:
        pass


@contextmanager
def serving(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server; retries do not wait."""
    monkeypatch.setattr(download, "RETRY_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(content) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
