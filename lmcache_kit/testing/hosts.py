"""Hosts within one process: memory, a transport, and a listener that peers dial."""

from __future__ import annotations

import contextlib
import mmap
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import Link, ReadableRegion, Region, Transport
from lmcache_kit.testing._bytes import Bytes

MakeTransport: TypeAlias = Callable[[memoryview], Transport]

_HOST = "127.0.0.1"
_PART_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 18


class Host:
    """Memory and transport of one cache process.

    ``raised`` lists the exceptions of the transport's ``serve`` and ``close``.
    """

    def __init__(self, make_transport: MakeTransport, nbytes: int, timeout_s: float) -> None:
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self.timeout_s = timeout_s
        self.raised: list[str] = []
        self.serving: list[threading.Thread] = []
        self.links: list[Link] = []
        self._used = 0
        self._listener = socket.create_server((_HOST, 0))
        # Accepted connections inherit the option. With large kernel buffers a host would have sent
        # everything before a test can disturb the connection.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self.transport = make_transport(self.memory)
        self._accepting = threading.Thread(target=self._accept, daemon=True, name="accepting")
        self._accepting.start()

    def link_to(self, source: Host, dial: Callable[[float], socket.socket] | None = None) -> Link:
        """Connect to ``source``; return a link that reads from it."""
        way = dial or source.dial
        link = self.transport.connect(source.transport.address(), way, self.timeout_s)
        self.links.append(link)
        return link

    def dial(self, timeout_s: float) -> socket.socket:
        """Dial this host's :meth:`Transport.serve`; peers get this as their ``dial``."""
        connection = socket.create_connection(self._listener.getsockname(), timeout_s)
        connection.settimeout(None)
        return connection

    def allocate(self, *sizes: int) -> list[Region]:
        """Take regions of these sizes, one after the other with a gap between them."""
        found = []
        for nbytes in sizes:
            found.append(Region(self._used, nbytes))
            self._used += nbytes + 64
        assert self._used <= len(self.memory), "the suite's memory is too small"
        return found

    def filled(self, *sizes: int, seed: int = 0) -> list[Region]:
        """Take regions of these sizes and fill them with random bytes."""
        regions = self.allocate(*sizes)
        draw = random.Random(seed)
        for offset, nbytes in regions:
            self.memory[offset : offset + nbytes] = draw.randbytes(nbytes)
        return regions

    def offer(self, regions: Sequence[Region]) -> bytes:
        """Offer the regions with their checksums."""
        return self.transport.offer([ReadableRegion(each, self.checksum(each)) for each in regions])

    def bytes_of(self, region: Region) -> Bytes:
        return Bytes(self.memory[region.offset : region.offset + region.nbytes])

    def checksum(self, region: Region) -> int:
        return xxh3_64_intdigest(self.memory[region.offset : region.offset + region.nbytes])

    def is_empty(self) -> bool:
        """Whether all bytes of the memory are zero."""
        return bytes(self.memory).count(0) == len(self.memory)

    def close(self) -> list[str]:
        """Close everything; return the names of threads that did not end."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        closing = threading.Thread(target=self._close, daemon=True, name="close()")
        closing.start()
        threads = [closing, self._accepting, *self.serving]
        for thread in threads:
            thread.join(self.timeout_s)
        self._listener.close()
        return [thread.name for thread in threads if thread.is_alive()]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(
                    target=self._serve, args=[connection], daemon=True, name="serve()"
                )
                self.serving.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self.transport.serve(connection)
        except BaseException as error:  # noqa: BLE001 - fails the test that dialled
            self.raised.append(f"serve() raised {error!r}")

    def _close(self) -> None:
        try:
            self.transport.close()
        except BaseException as error:  # noqa: BLE001 - fails the test
            self.raised.append(f"close() raised {error!r}")


class Wire:
    """Proxy to a host that changes the bytes which the host sends.

    ``change(position, data)`` returns the bytes that the reader gets instead, and may block. None,
    or fewer bytes than ``data``, cuts the connection. ``said`` records all bytes of the host.
    """

    def __init__(self, host: Host, change: Callable[[int, bytes], bytes | None]) -> None:
        self.said = bytearray()
        self._host = host
        self._change = change
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def dial(self, timeout_s: float) -> socket.socket:
        near, far = socket.socketpair()
        up = self._host.dial(timeout_s)
        up.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._sockets += [far, up]
        for copy, source, sink in ((self._ask, far, up), (self._answer, up, far)):
            thread = threading.Thread(target=copy, args=[source, sink], daemon=True, name="wire")
            self._threads.append(thread)
            thread.start()
        return near

    def close(self) -> None:
        for each in self._sockets:
            _hang_up(each)
        for thread in self._threads:
            thread.join(self._host.timeout_s)
        for each in self._sockets:
            each.close()

    def _ask(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PART_BYTES):
                sink.sendall(data)
        _hang_up(source, sink)

    def _answer(self, source: socket.socket, sink: socket.socket) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_PART_BYTES):
                self.said += data
                changed = self._change(position, data)
                if changed is None:
                    break
                sink.sendall(changed)
                if len(changed) < len(data):
                    break
                position += len(data)
        _hang_up(source, sink)


class Stall:
    """A change of a :class:`Wire`: hold all bytes from ``at`` on until :attr:`go_on` is set."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, position: int, data: bytes) -> bytes:
        if position + len(data) > self.at:
            self.reached.set()
            self.go_on.wait(60)
        return data


def flip(at: int) -> Callable[[int, bytes], bytes]:
    """A change of a :class:`Wire`: flip one bit."""

    def change(position: int, data: bytes) -> bytes:
        if not position <= at < position + len(data):
            return data
        changed = bytearray(data)
        changed[at - position] ^= 1
        return bytes(changed)

    return change


def cut(at: int) -> Callable[[int, bytes], bytes | None]:
    """A change of a :class:`Wire`: cut the connection after ``at`` bytes."""
    return lambda position, data: data[: at - position] if position < at else None


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
