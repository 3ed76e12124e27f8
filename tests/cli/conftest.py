"""The command in this process, and a server that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lmcache_kit.cli import _follow
from lmcache_kit.cli.app import app


def kit(*arguments: str, stdin: str = "") -> Result:
    """``lmcache-kit`` with these arguments."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


def event_in(state: str, part: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the controller says of an event with this one part; ``fields`` say what it is about."""
    return {
        "event_id": "e1",
        "state": state,
        "num_tokens": 12,
        "message": "",
        "progress": [part],
        "created": 100.0,
        "started": 100.5,
        "ended": None if state in ("queued", "running") else 101.0,
        "deadline": 700.0,
        "idempotency_key": None,
        **fields,
    }


@pytest.fixture
def poll_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_follow, "POLL_S", 0.01)
    monkeypatch.setattr(_follow, "LINE_S", 0.0)


class Server(ThreadingHTTPServer):
    """Answers requests in turn, with the last answer for ever; keeps what it was asked."""

    def __init__(self, answers: tuple[object, ...], status: int, location: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.status, self.location = list(answers), status, location
        self.asked: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_answer(self) -> bytes:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append({"path": self.path, **json.loads(body or b"{}")})
        self.server.headers.append(dict(self.headers))
        answer = self.server.next_answer()
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        pass


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Server] = []

    def _start(*answers: object, status: int = 200, location: str = "") -> Server:
        servers.append(Server(answers, status, location))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield _start
    for server in servers:
        server.shutdown()
        server.server_close()
