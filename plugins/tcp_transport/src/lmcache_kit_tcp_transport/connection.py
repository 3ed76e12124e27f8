"""A socket with deadlines that any thread can close."""

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
# Large enough that taking the GIL again after each part does not show, and small enough to be
# hashed while it is in the processor's cache.
PART_BYTES = 1 << 20
# TLS has one time-out for a whole part, so a slow network must get a part through in time.
_TLS_PART_BYTES = 256 << 10
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)


class Connection:
    """A connection that one thread at a time uses, and that any thread may close.

    Every method raises TransferTimeout at its deadline, and TransportError when the connection is
    lost. After either, the connection must be closed, since a message may be cut.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._closed = False
        # Re-entrant: the garbage collector may end a generator, and so close, at any point.
        self._closing = threading.RLock()
        self._using = threading.RLock()
        self._tls = isinstance(connection, ssl.SSLSocket)
        self.description = "TCP"
        if isinstance(connection, ssl.SSLSocket):
            self.description = f"{connection.version() or 'TLS'} over TCP"
        self.peer = _name(connection)
        with contextlib.suppress(OSError):  # a lost connection is reported at its first use
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def receive(self, into: memoryview, deadline: float | None = None) -> int:
        """Receive 1 to :data:`PART_BYTES` bytes; return how many."""
        flags = 0 if self._tls else socket.MSG_WAITALL
        with self.using_socket(socket.SO_RCVTIMEO, deadline):
            received = self._socket.recv_into(into[:PART_BYTES], 0, flags)
        if not received:
            raise self._lost("it closed the connection")
        return received

    def receive_exactly(self, nbytes: int, deadline: float | None = None) -> bytes:
        data = bytearray(nbytes)
        rest = memoryview(data)
        while rest:
            rest = rest[self.receive(rest, deadline) :]
        return bytes(data)

    def send(self, header: bytes, payload: memoryview | None = None, *, stall_s: float) -> None:
        """Send header and payload. ``stall_s`` limits the time without progress."""
        rest = memoryview(header)
        if payload is not None and not self._tls:
            with self.using_socket(socket.SO_SNDTIMEO, time.monotonic() + stall_s):
                sent = self._socket.sendmsg([header, payload])
            rest, payload = rest[sent:], payload[max(0, sent - len(header)) :]
        self._send_all(rest, stall_s)
        if payload is not None:
            self._send_all(payload, stall_s)

    def close(self) -> None:
        """Close; a thread that sends or receives gets TransportError. Safe to call twice.

        When this returns, no more bytes go from or to the memory that was passed. Any thread may
        call this.
        """
        with self._closing:
            first, self._closed = not self._closed, True
            # Not SSLSocket.shutdown, which drops the TLS layer first: a sending thread would go on
            # in plain text.
            with contextlib.suppress(OSError):
                if first:
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with self._using:
            self._socket.close()

    def _send_all(self, rest: memoryview, stall_s: float) -> None:
        while rest:
            with self.using_socket(socket.SO_SNDTIMEO, time.monotonic() + stall_s):
                sent = self._socket.send(rest[:_TLS_PART_BYTES] if self._tls else rest)
            rest = rest[sent:]

    @contextlib.contextmanager
    def using_socket(self, limit: int, deadline: float | None) -> Iterator[None]:
        left = None if deadline is None else deadline - time.monotonic()
        late = TransferTimeout(f"{self.peer} took too long")
        with self._using:
            if self._closed:
                raise self._lost("")
            if left is not None and left <= 0:
                raise late
            try:
                self._set_timeout(limit, left)
                yield
            except (TimeoutError, BlockingIOError) as error:
                raise late from error
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from error

    def _set_timeout(self, option: int, left: float | None) -> None:
        """Set the time-out of the next call; None for no limit.

        Plain sockets use the kernel's time-outs: a call then moves all of its bytes without
        returning to Python and taking the GIL each time. TLS needs Python's time-outs.
        """
        if self._tls:
            self._socket.settimeout(left)
            return
        microseconds = 0 if left is None else max(1, int(left * 1e6))
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        )

    def _lost(self, reason: str) -> TransportError:
        if self._closed:
            return TransportError(f"the connection with {self.peer} was closed on this side")
        return TransportError(f"the connection with {self.peer} is lost: {reason}")


def _name(connection: socket.socket) -> str:
    try:
        name = connection.getpeername()
    except OSError:
        return "a peer that is gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a peer on this host"
