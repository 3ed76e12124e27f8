"""The transport ``tcp``."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence
from weakref import WeakSet

import msgspec

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import Dial, Link, ReadableRegion, Transport
from lmcache_kit_tcp_transport.connection import Connection
from lmcache_kit_tcp_transport.link import TcpLink
from lmcache_kit_tcp_transport.offers import Offers
from lmcache_kit_tcp_transport.serving import answer_all
from lmcache_kit_tcp_transport.wire import (
    VERSION,
    Address,
    pack_offer,
    unpack_address,
    unpack_offer,
)

logger = logging.getLogger(__name__)


class TcpTransport(Transport):
    """KV over the connections that peers dial: plain, or TLS if the cache process is set up so.

    ``host`` is not used, since the cache process dials and accepts.
    """

    def __init__(self, memory: memoryview, host: str) -> None:
        self._memory = memory.cast("B")
        self._offers = Offers(len(self._memory))
        self._lock = threading.Lock()
        self._closed = False
        self._connections: WeakSet[Connection] = WeakSet()

    def address(self) -> bytes:
        return msgspec.msgpack.encode(Address(version=VERSION))

    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        """Offer the regions. Raises ValueError for regions outside of the memory."""
        if self._closed:
            raise TransportError("the transport is closed")
        return pack_offer(self._offers.add(regions), len(regions))

    def withdraw(self, offer: bytes) -> None:
        with contextlib.suppress(TransportError):
            self._offers.withdraw(unpack_offer(offer)[0])

    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        deadline = time.monotonic() + timeout_s
        unpack_address(address)
        try:
            dialled = dial(timeout_s)
        except TransportError:
            raise
        except OSError as error:
            raise TransportError(f"the peer cannot be reached over TCP: {error}") from error
        link = TcpLink(self._register(dialled), self._memory)
        try:
            link.hello(deadline - time.monotonic())
        except BaseException:
            link.close()
            raise
        return link

    def serve(self, connection: socket.socket) -> None:
        try:
            peer = self._register(connection)
        except TransportError:
            return
        try:
            answer_all(peer, self._memory, self._offers)
        except TransportError as error:
            logger.debug("no longer serving %s: %s", peer.peer, error)
        finally:
            peer.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        self._offers.clear()
        for connection in connections:
            connection.close()

    def _register(self, connection: socket.socket) -> Connection:
        registered = Connection(connection)
        with self._lock:
            if not self._closed:
                self._connections.add(registered)
                return registered
        registered.close()
        raise TransportError("the transport is closed")
