"""The peer port, and connections to the peer ports of others."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from lmcache_kit.errors import ConfigError, TransportError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
HANDSHAKE_S = 5.0
_BACKLOG = 64


class Tls(NamedTuple):
    """The two contexts of mutual TLS: each side shows a certificate of the same authority."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, cert: str, key: str, authority: str) -> Tls:
        """Load PEM files. Raises ConfigError."""
        contexts = []
        for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_cert_chain(cert, key)
                context.load_verify_locations(authority)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"p2p_tls_cert {cert!r}, p2p_tls_key {key!r} and p2p_tls_ca {authority!r} "
                    f"cannot be used: {error}",
                    hint="They are PEM files: a certificate, its key, and the authority's",
                ) from error
            contexts.append(context)
        return cls(*contexts)


def dial(url: str, timeout_s: float, tls: Tls | None = None) -> socket.socket:
    """Connect to ``HOST:PORT``. Raises TransportError."""
    address = urlsplit(f"//{url}")
    try:
        host, port = address.hostname or "", address.port or 0
        connection = socket.create_connection((host, port), timeout_s)
    except (OSError, ValueError) as error:
        raise TransportError(f"cannot connect to {url}: {error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if tls is not None:
            return tls.client.wrap_socket(connection, server_hostname=host)
    except OSError as error:
        connection.close()
        raise TransportError(f"no TLS with {url}: {error}") from error
    return connection


class Listener:
    """The peer port.

    Calls ``serve`` with each connection, on a thread of its own, and closes the connection after
    it. Raises TransportError when the port cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        serve: Callable[[socket.socket], None],
        *,
        tls: Tls | None = None,
    ) -> None:
        self._serve = serve
        self._tls = tls
        self._threads: set[threading.Thread] = set()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._socket = listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{shown}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(
            target=self._accept, name="lmcache-kit-peer-port", daemon=True
        )

    def start(self) -> None:
        """Begin to accept connections."""
        self._thread.start()

    def close(self) -> None:
        """Close the port and all its connections. Safe to call twice."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        for thread in list(self._threads):
            thread.join(HANDSHAKE_S)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("cannot accept a connection: %s", error)
                    threading.Event().wait(1.0)
                    continue
                if self._closed or error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    return
                continue
            self._start_thread(connection)

    def _start_thread(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._run, args=(connection,), name="lmcache-kit-peer", daemon=True
        )
        with self._lock:
            if self._closed or len(self._threads) >= MAX_CONNECTIONS:
                connection.close()
                return
            self._threads.add(thread)
            self._connections.add(connection)
        thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(HANDSHAKE_S)
            stream = connection
            if self._tls is not None:
                stream = self._tls.server.wrap_socket(connection, server_side=True)
                with self._lock:
                    self._connections.add(stream)
            with stream:
                self._serve(stream)
        except OSError as error:
            log.info("a peer's connection ended: %s", error)
        finally:
            connection.close()
            with self._lock:
                self._threads.discard(threading.current_thread())
                self._connections = {each for each in self._connections if each.fileno() >= 0}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises TransportError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # "localhost" may have addresses of both families, and peers try IPv4 first.
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(
            f"p2p_host: {host!r} is not an address of this machine: {error}",
            hint="Set p2p_host to the name or address that peers reach this host by",
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise TransportError(
            f"p2p_init_ports: cannot listen on port {port} of {host!r}: {error.strerror}",
            hint="Set p2p_init_ports to a free port, and p2p_host to an address of this host",
        ) from error
    return listener
