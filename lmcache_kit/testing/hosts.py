"""Two hosts in one process: memory, a transport, and a listener for what peers dial."""

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
_PIECE_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 18


class Host:
    """One cache process's memory and transport. What its ``serve`` and its last ``close`` raise is
    told in ``raised``."""

    def __init__(self, make_transport: MakeTransport, nbytes: int, patience_s: float) -> None:
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self.patience_s = patience_s
        self.raised: list[str] = []
        self.serving: list[threading.Thread] = []
        self.links: list[Link] = []
        self._used = 0
        self._listener = socket.create_server((_HOST, 0))
        # Those that are accepted have it too. What a host says is not to vanish in the kernel, or
        # it would be done before anything can happen to it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self.transport = make_transport(self.memory)
        self._accepting = threading.Thread(target=self._accept, daemon=True, name="accepting")
        self._accepting.start()

    def link_to(self, source: Host, dial: Callable[[float], socket.socket] | None = None) -> Link:
        """A way to read from ``source``."""
        way = dial or source.dial
        link = self.transport.connect(source.transport.address(), way, self.patience_s)
        self.links.append(link)
        return link

    def dial(self, timeout_s: float) -> socket.socket:
        """What peers are given to reach this host's :meth:`Transport.serve`."""
        connection = socket.create_connection(self._listener.getsockname(), timeout_s)
        connection.settimeout(None)
        return connection

    def room(self, *sizes: int) -> list[Region]:
        """Regions of these sizes, one after the other with a gap between them."""
        found = []
        for nbytes in sizes:
            found.append(Region(self._used, nbytes))
            self._used += nbytes + 64
        assert self._used <= len(self.memory), "the suite's memory is too small"
        return found

    def filled(self, *sizes: int, seed: int = 0) -> list[Region]:
        """Regions of these sizes with random bytes in them."""
        regions = self.room(*sizes)
        draw = random.Random(seed)
        for offset, nbytes in regions:
            self.memory[offset : offset + nbytes] = draw.randbytes(nbytes)
        return regions

    def offer(self, regions: Sequence[Region]) -> bytes:
        """Offer them with their checksums."""
        return self.transport.offer([ReadableRegion(each, self.checksum(each)) for each in regions])

    def bytes_of(self, region: Region) -> Bytes:
        return Bytes(self.memory[region.offset : region.offset + region.nbytes])

    def checksum(self, region: Region) -> int:
        return xxh3_64_intdigest(self.memory[region.offset : region.offset + region.nbytes])

    def is_empty(self) -> bool:
        """Nothing has landed anywhere."""
        return bytes(self.memory).count(0) == len(self.memory)

    def close(self) -> list[str]:
        """Close everything; the names of threads that did not end."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        closing = threading.Thread(target=self._close, daemon=True, name="close()")
        closing.start()
        threads = [closing, self._accepting, *self.serving]
        for thread in threads:
            thread.join(self.patience_s)
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
        except BaseException as error:  # noqa: BLE001 - the test that dialled fails of it
            self.raised.append(f"serve() raised {error!r}")

    def _close(self) -> None:
        try:
            self.transport.close()
        except BaseException as error:  # noqa: BLE001 - the test fails of it
            self.raised.append(f"close() raised {error!r}")


class Wire:
    """A connection to a host through which something happens to what the host says.

    ``change(position, data)`` returns what the reader gets instead; None, or less than there is,
    cuts the connection. It may wait. What the host said is kept in ``said``.
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
            thread.join(self._host.patience_s)
        for each in self._sockets:
            each.close()

    def _ask(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                sink.sendall(data)
        _hang_up(source, sink)

    def _answer(self, source: socket.socket, sink: socket.socket) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
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
    """A change of a :class:`Wire`: nothing passes from ``at`` on until told to :attr:`go_on`."""

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
    """A change of a :class:`Wire`: one bit is another one."""

    def change(position: int, data: bytes) -> bytes:
        if not position <= at < position + len(data):
            return data
        changed = bytearray(data)
        changed[at - position] ^= 1
        return bytes(changed)

    return change


def cut(at: int) -> Callable[[int, bytes], bytes | None]:
    """A change of a :class:`Wire`: it ends after so many bytes."""
    return lambda position, data: data[: at - position] if position < at else None


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
