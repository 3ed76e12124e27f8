"""A socket with deadlines, that any thread can close."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator

from lmcache_kit.errors import TransferTimeout, TransportError

_TIMEVAL = struct.Struct("@ll")
# So much that taking the interpreter's lock again after each piece does not show, and so little
# that it is hashed while it is in the CPU's cache.
PIECE_BYTES = 1 << 20
# TLS counts its time-out over a whole piece, so a slow network must get one through.
_TLS_PIECE_BYTES = 256 << 10
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)


class Connection:
    """One thread at a time receives or sends, and any thread closes.

    Every method raises TransferTimeout when its time is up, and TransportError when the
    connection is over. After either, the connection must be closed: a message may be cut.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._closed = False
        # Re-entrant: a generator that the garbage collector ends may close at any point.
        self._closing = threading.RLock()
        self._using = threading.RLock()
        self._tls = isinstance(connection, ssl.SSLSocket)
        self.how = "TCP"
        if isinstance(connection, ssl.SSLSocket):
            self.how = f"{connection.version() or 'TLS'} over TCP"
        self.peer = _name(connection)
        with contextlib.suppress(OSError):  # it may be gone already; the first use tells
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def receive(self, into: memoryview, deadline: float | None = None) -> int:
        """Receive some bytes, at least one, at most :data:`PIECE_BYTES`; how many."""
        flags = 0 if self._tls else socket.MSG_WAITALL
        with self.in_use(socket.SO_RCVTIMEO, deadline):
            received = self._socket.recv_into(into[:PIECE_BYTES], 0, flags)
        if not received:
            raise self._over("it closed the connection")
        return received

    def receive_exactly(self, nbytes: int, deadline: float | None = None) -> bytes:
        data = bytearray(nbytes)
        rest = memoryview(data)
        while rest:
            rest = rest[self.receive(rest, deadline) :]
        return bytes(data)

    def send(self, header: bytes, payload: memoryview | None = None, *, stall_s: float) -> None:
        """Send both. ``stall_s``: the longest that nothing may move."""
        rest = memoryview(header)
        if payload is not None and not self._tls:
            with self.in_use(socket.SO_SNDTIMEO, time.monotonic() + stall_s):
                sent = self._socket.sendmsg([header, payload])
            rest, payload = rest[sent:], payload[max(0, sent - len(header)) :]
        self._send_all(rest, stall_s)
        if payload is not None:
            self._send_all(payload, stall_s)

    def close(self) -> None:
        """End it; who is sending or receiving gets an error. When this returns, no more bytes go
        from or to the memory that they passed. Safe to call twice, from any thread."""
        with self._closing:
            first, self._closed = not self._closed, True
            # Not SSLSocket.shutdown: that drops the TLS layer first, and who is sending would go
            # on in plain text.
            with contextlib.suppress(OSError):
                if first:
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with self._using:
            self._socket.close()

    def _send_all(self, rest: memoryview, stall_s: float) -> None:
        while rest:
            with self.in_use(socket.SO_SNDTIMEO, time.monotonic() + stall_s):
                sent = self._socket.send(rest[:_TLS_PIECE_BYTES] if self._tls else rest)
            rest = rest[sent:]

    @contextlib.contextmanager
    def in_use(self, limit: int, deadline: float | None) -> Iterator[None]:
        left = None if deadline is None else deadline - time.monotonic()
        late = TransferTimeout(f"{self.peer} took too long")
        with self._using:
            if self._closed:
                raise self._over("")
            if left is not None and left <= 0:
                raise late
            try:
                self._limit(limit, left)
                yield
            except (TimeoutError, BlockingIOError) as error:
                raise late from error
            except OSError as error:
                raise self._over(error.strerror or str(error)) from error

    def _limit(self, option: int, left: float | None) -> None:
        """Let the next call take so many seconds.

        The kernel's own limits, where they can be had: a call then moves all of its bytes without
        coming back to Python, which would have to take the interpreter's lock each time. TLS needs
        Python's.
        """
        if self._tls:
            self._socket.settimeout(left)
            return
        microseconds = 0 if left is None else max(1, int(left * 1e6))
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        )

    def _over(self, reason: str) -> TransportError:
        if self._closed:
            return TransportError(f"the connection with {self.peer} was closed on this side")
        return TransportError(f"the connection with {self.peer} is lost: {reason}")


def _name(connection: socket.socket) -> str:
    try:
        name = connection.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a peer on this host"
