"""What stands between a client and a server and disturbs them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

from tests.support.ports import HOST
from tests.support.waiting import DEADLINE_S

Change: TypeAlias = Callable[[int, bytes], bytes | None]
"""``change(position, data)`` returns what the client gets instead of ``data``, or None to cut all
connections. ``position`` counts the bytes that came from the server before, over all connections.
``lmcache_kit.testing.hosts`` has changes ready: ``flip``, ``cut``, ``Stall``."""

_PIECE_BYTES = 1 << 12
"""A change that waits holds back a whole piece, so pieces are small."""


def unchanged(position: int, data: bytes) -> bytes:
    """Pass everything on."""
    return data


class Listener:
    """A server on a free port that runs ``serve`` with each connection, in a thread for each."""

    def __init__(
        self, serve: Callable[[socket.socket], None], *, receive_buffer: int | None = None
    ) -> None:
        self._serve = serve
        self._listener = socket.socket()
        if receive_buffer is not None:  # accepted connections inherit it
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind((HOST, 0))
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]
        self.address = f"{HOST}:{self.port}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def dial(self, timeout_s: float = DEADLINE_S) -> socket.socket:
        """Connect to this server; the connection itself blocks without a limit."""
        connection = socket.create_connection((HOST, self.port), timeout_s)
        connection.settimeout(None)
        return connection

    def cut(self) -> None:
        """End all connections; new ones work."""
        with self._lock:
            for each in self._open:
                hang_up(each)

    def close(self) -> None:
        """End all connections, listen no more, and wait for the threads."""
        hang_up(self._listener)
        self._threads[0].join(DEADLINE_S)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a connection is still served"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with self._lock:
                    self._open.add(connection)
                thread = threading.Thread(target=self._one, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _one(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                self._serve(connection)
        finally:
            with self._lock:
                self._open.discard(connection)
                connection.close()


class Proxy:
    """A port that leads to another port of this host, and passes on what ``change`` returns.

    Clear ``flowing`` to hold back what the server says; ``passed`` counts its bytes.
    """

    def __init__(self, port: int, change: Change = unchanged, *, host: str = HOST) -> None:
        self.change = change
        self.passed = 0
        self.flowing = threading.Event()
        self.flowing.set()
        self._target = (host, port)
        self._lock = threading.Lock()
        self._listener = Listener(self._pass)
        self.port, self.address = self._listener.port, self._listener.address
        self.dial = self._listener.dial

    def lead_to(self, port: int) -> None:
        """Lead connections from now on to another port."""
        self._target = (self._target[0], port)

    def cut(self) -> None:
        """End all connections; new ones work."""
        self._listener.cut()

    def close(self) -> None:
        self.flowing.set()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _pass(self, client: socket.socket) -> None:
        """Serve one connection: its end at one side ends the other."""
        with socket.create_connection(self._target) as server:
            requests = threading.Thread(target=self._requests, args=(client, server), daemon=True)
            requests.start()
            try:
                self._answers(server, client)
            finally:
                hang_up(client, server)
                requests.join(DEADLINE_S)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_PIECE_BYTES):
                server.sendall(data)
        hang_up(client, server)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        while data := server.recv(_PIECE_BYTES):
            with self._lock:
                position, self.passed = self.passed, self.passed + len(data)
            self.flowing.wait()
            changed = self.change(position, data)
            if changed is None:
                self.cut()
                return
            client.sendall(changed)
            if len(changed) < len(data):
                return


def hang_up(*sockets: socket.socket) -> None:
    """End connections at both sides, without closing the sockets."""
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
