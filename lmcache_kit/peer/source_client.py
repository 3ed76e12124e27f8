"""The source of a move as its destination calls it, over one connection."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.errors import ControlError, OperationFailed, ProtocolError, TransportError
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.peer import Answer, Request, Welcome

ANSWER_S = 10.0
OPEN_S = 8.0

Connect = Callable[[float], socket.socket]
"""Takes a timeout in seconds, returns a new connection to the source's peer port. Raises
TransportError."""
_A = TypeVar("_A", bound=Answer)


class SourceClient:
    """One move that a source has agreed to. ``name`` is the source's, for messages.

    Every call raises TransportError when the source does not answer in time or the connection is
    lost, and OperationFailed when the source refuses.
    """

    def __init__(self, connection: socket.socket, name: str, welcome: Welcome) -> None:
        self.welcome = welcome
        self.name = name
        self._connection = connection

    @classmethod
    def open(
        cls, connect: Connect, name: str, opening: wire.Open, timeout_s: float
    ) -> SourceClient:
        """Connect and show the capability; the source's answer is :attr:`welcome`."""
        deadline = time.monotonic() + min(timeout_s, OPEN_S)
        connection = connect(deadline - time.monotonic())
        try:
            welcome = _call(connection, name, opening, Welcome, deadline)
        except BaseException:
            connection.close()
            raise
        return cls(connection, name, welcome)

    def chunks(self) -> list[ChunkRef]:
        """List all chunks that the capability covers."""
        found = list(self.welcome.first)
        while len(found) < self.welcome.chunks:
            page = self._call(wire.ListChunks(len(found)), wire.Listing).chunks
            if not page:
                raise TransportError(f"{self.name} lists {len(found)} of {self.welcome.chunks}")
            found += page
        return found

    def lease(self, keys: Sequence[ChunkKey], transport: str) -> wire.Leased:
        """Lease those of these chunks that are still stored, and offer them to a transport."""
        leased = self._call(wire.Lease(tuple(keys), transport), wire.Leased)
        if not {descriptor.key for descriptor in leased.descriptors} <= set(keys):
            raise TransportError(f"{self.name} leases chunks that were not asked for")
        return leased

    def read_offer(self, lease: int, transport: str, chunks: Sequence[int]) -> bytes:
        """Offer chunks of a lease, by their numbers in it, to a transport of the source."""
        return self._call(wire.ReadOffer(lease, transport, tuple(chunks)), wire.Offered).offer

    def verify(self, keys: Sequence[ChunkKey]) -> None:
        """Have the source compare chunks with their checksums and drop corrupt ones."""
        self._call(wire.Verify(tuple(keys)), wire.Done)

    def release(self, lease: int) -> None:
        """End a lease."""
        self._call(wire.Release(lease), wire.Done)

    def delete(self, keys: Sequence[ChunkKey]) -> DeleteResult:
        """Delete chunks at the source, which the destination has now."""
        return self._call(wire.Delete(tuple(keys)), wire.Deleted).result

    def close(self) -> None:
        """Hang up; calls under way fail. Safe to call twice, and from any thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _call(self, request: Request, kind: type[_A]) -> _A:
        return _call(self._connection, self.name, request, kind, time.monotonic() + ANSWER_S)


def attach(
    connect: Connect, name: str, transport: str, token: bytes, timeout_s: float
) -> socket.socket:
    """Return a blocking connection to a transport of the source. Raises TransportError."""
    deadline = time.monotonic() + timeout_s
    connection = connect(timeout_s)
    try:
        request = wire.Attach(wire.VERSION, transport, token)
        _call(connection, name, request, wire.Attached, deadline)
    except ControlError as error:
        connection.close()
        raise TransportError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _call(
    connection: socket.socket, name: str, request: Request, kind: type[_A], deadline: float
) -> _A:
    left_s = max(0.001, deadline - time.monotonic())
    try:
        wire.send(connection, request, left_s)
        answer = wire.receive_answer(connection, max(0.001, deadline - time.monotonic()))
    except TimeoutError as error:
        raise TransportError(f"{name} does not answer") from error
    except (OSError, ProtocolError) as error:
        raise TransportError(f"{name} is gone: {error}") from error
    if isinstance(answer, wire.Refused):
        raise OperationFailed(f"{name} refuses: {answer.reason[:1000]}")
    if not isinstance(answer, kind):
        raise TransportError(f"{name} answers {type(request).__name__} with {answer!r:.100}")
    return answer
